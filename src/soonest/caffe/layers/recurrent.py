"""RNN and LSTM over the steps of several streams, and one step of an LSTM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from soonest.caffe.layers.base import Layer, Shape, count
from soonest.caffe.proto.message import Message


class _Forget(torch.autograd.Function):
    """A gate times a marker, with Caffe's gradient: that of a gate of the product's value."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, marker: Tensor) -> Tensor:
        gate = torch.sigmoid(values) * marker
        ctx.save_for_backward(gate)
        return gate

    @staticmethod
    def backward(ctx: Any, *sent: Tensor) -> tuple[Tensor, None]:
        (gate,) = ctx.saved_tensors
        return sent[0] * gate * (1 - gate), None


def lstm_step(cell: Tensor, gates: Tensor, marker: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM.

    Args:
        cell: what it remembers, (streams, D).
        gates: before their functions, (streams, 4D): in, forget, out, and what is new.
        marker: (streams, 1); at 0 a stream starts anew.

    Returns:
        What it remembers now, and what it gives.
    """
    let_in, forget, let_out, new = gates.chunk(4, 1)
    kept = _Forget.apply(forget, marker) * cell
    cell = kept + torch.sigmoid(let_in) * torch.tanh(new)
    return cell, torch.sigmoid(let_out) * torch.tanh(cell)


class LSTMUnit(Layer):
    """One step: from (1, N, D) that it remembers, (1, N, 4D) gates, and markers of (1, N)."""

    bottoms = (3, 3)
    tops = (2, 2)

    def forward(self, cell: Tensor, gates: Tensor, marker: Tensor) -> tuple[Tensor, Tensor]:
        steps, streams, width = (*cell.shape, 0, 0, 0)[:3]
        fits = cell.dim() == 3 and gates.shape == (steps, streams, 4 * width) and steps == 1
        if not fits or marker.shape != (steps, streams):
            shapes = [list(one.shape) for one in (cell, gates, marker)]
            raise ValueError(f"its bottoms must be 1 x N x D, 1 x N x 4D and 1 x N, not {shapes}")
        found = lstm_step(cell[0], gates[0], marker[0].detach().unsqueeze(1))
        return found[0].unsqueeze(0), found[1].unsqueeze(0)


class _Recurrent(Layer):
    """Steps over time.

    Bottoms: (T, N, …) for T steps of N streams; markers of (T, N), 0 where a stream starts anew;
    perhaps one that is the same in all steps, (N, …). A pass goes on from the state in which the
    last one ended, and gradients end there. With ``expose_hidden`` the states at the start are
    bottoms, and those at the end tops.
    """

    states: ClassVar[int] = 1
    """How many it goes on from."""
    bottoms = (2, 5)
    tops = (1, 3)
    from_input: Tensor
    from_static: Tensor
    bias: Tensor

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.recurrent_param
        self.width, self.exposes = own.num_output, own.expose_hidden
        if self.width < 1:
            raise ValueError("give a num_output above 0")
        exposed = self.states if self.exposes else 0
        self.has_static = len(shapes) - exposed == 3
        if len(shapes) - exposed not in (2, 3) or len(spec.top) != 1 + exposed:
            raise ValueError(
                f"it has {len(shapes)} bottoms and {len(spec.top)} tops: it takes the steps, their "
                f"markers, perhaps what is the same in all, and {exposed} states, and gives "
                f"{1 + exposed} tops"
            )
        if len(shapes[0]) < 3 or len(shapes[1]) != 2:
            raise ValueError(
                f"its steps must have 3 axes or more and its markers 2, not {list(shapes[0])} and "
                f"{list(shapes[1])}"
            )
        self.steps = shapes[0][0]
        self.inputs = count(shapes[0][2:])
        static = count(shapes[2][1:]) if self.has_static else 0
        for name, shape in self._blob_shapes(static).items():
            self.add_blob(name, shape, own.bias_filler if len(shape) == 1 else own.weight_filler)
        self._memory: list[Tensor] = []
        """The states at the end of the last pass, flat, with room for the most streams so far."""

    def _blob_shapes(self, static: int) -> dict[str, Shape]:
        """Of its blobs, in their order in files; without a static bottom that is of size 0."""
        raise NotImplementedError

    def _step(
        self, given: Tensor, states: list[Tensor], marker: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """What a step gives, and the states after it.

        Args:
            given: what comes from the bottoms, times their weights.
            states: before it.
            marker: (N, 1).
        """
        raise NotImplementedError

    def _given(self, values: Tensor, static: Tensor | None) -> Tensor:
        """What all steps get from the bottoms, in one product: (T, N, …)."""
        given = functional.linear(values, self.from_input, self.bias)
        return (
            given
            if static is None
            else given + static.reshape(len(static), -1) @ self.from_static.t()
        )

    def forward(self, values: Tensor, markers: Tensor, *rest: Tensor) -> Tensor | list[Tensor]:
        steps, streams = values.shape[:2]
        static = rest[0] if self.has_static else None
        self._check(values, markers, static)
        starts = list(rest[1 if self.has_static else 0 :])
        states = self._exposed(starts, streams) if self.exposes else self._remembered(values)
        markers = markers.detach().unsqueeze(2)
        given = self._given(values.reshape(steps, streams, -1), static)
        tops: list[Tensor] = []
        for step in range(steps):
            top, states = self._step(given[step], states, markers[step])
            tops.append(top)
        if self.exposes:
            return [torch.stack(tops), *(state.detach().unsqueeze(0) for state in states)]
        if not values.is_meta:
            self._remember(states)
        return torch.stack(tops)

    def _check(self, values: Tensor, markers: Tensor, static: Tensor | None) -> None:
        steps, streams = values.shape[:2]
        if markers.shape != (steps, streams):
            raise ValueError(
                f"its markers must be {steps} x {streams}, one for each step of each stream, not "
                f"{list(markers.shape)}"
            )
        if steps != self.steps:
            raise ValueError(f"it has {steps} steps, but was made for {self.steps}")
        if count(values.shape[2:]) != self.inputs:
            raise ValueError(
                f"its steps have the shape {list(values.shape[2:])}, but its weights are for "
                f"{self.inputs} values"
            )
        if static is not None and static.shape[:1] != (streams,):
            raise ValueError(
                f"its static bottom must be for {streams} streams, not {list(static.shape)}"
            )

    def _exposed(self, starts: list[Tensor], streams: int) -> list[Tensor]:
        for start in starts:
            if start.shape != (1, streams, self.width):
                raise ValueError(
                    f"its states at the start must be 1 x {streams} x {self.width}, not "
                    f"{list(start.shape)}"
                )
        return [start.detach()[0] for start in starts]

    def _remembered(self, values: Tensor) -> list[Tensor]:
        """Zeros at first. As in Caffe, fewer streams go on from the first values of the memory."""
        size = values.shape[1] * self.width
        if values.is_meta or not self._memory or self._memory[0].numel() < size:
            return [values.new_zeros(values.shape[1], self.width) for _ in range(self.states)]
        return [memory[:size].reshape(-1, self.width) for memory in self._memory]

    def _remember(self, states: list[Tensor]) -> None:
        ends = [state.detach().reshape(-1) for state in states]
        old = self._memory or ends
        self._memory = [
            torch.cat([end, memory[len(end) :]]) for end, memory in zip(ends, old, strict=True)
        ]


class RNN(_Recurrent):
    """Weights: W_xh (D, I), b_h, W_xh of the static bottom if there is one, W_hh, W_ho, b_o."""

    bottoms = (2, 4)
    tops = (1, 2)
    from_state: Tensor
    to_output: Tensor
    output_bias: Tensor

    def _blob_shapes(self, static: int) -> dict[str, Shape]:
        width = self.width
        return {
            "from_input": (width, self.inputs),
            "bias": (width,),
            **({"from_static": (width, static)} if static else {}),
            "from_state": (width, width),
            "to_output": (width, width),
            "output_bias": (width,),
        }

    def _step(
        self, given: Tensor, states: list[Tensor], marker: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        state = torch.tanh(given + (states[0] * marker) @ self.from_state.t())
        return torch.tanh(functional.linear(state, self.to_output, self.output_bias)), [state]


class LSTM(_Recurrent):
    """Weights: W_xc (4D, I), b_c, W_xc of the static bottom if there is one, W_hc (4D, D).

    Rows are those of the gates in, forget and out, and of what is new. States: what it gave last,
    and what it remembers.
    """

    states = 2
    from_state: Tensor

    def _blob_shapes(self, static: int) -> dict[str, Shape]:
        rows = 4 * self.width
        return {
            "from_input": (rows, self.inputs),
            "bias": (rows,),
            **({"from_static": (rows, static)} if static else {}),
            "from_state": (rows, self.width),
        }

    def _step(
        self, given: Tensor, states: list[Tensor], marker: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        gave, cell = states
        cell, gives = lstm_step(cell, given + (gave * marker) @ self.from_state.t(), marker)
        return gives, [gives, cell]
