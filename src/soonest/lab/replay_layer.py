"""One layer of a replay, whose values are known to the last bit.

Every number is a small integer times a power of two, so that sums come out exactly whatever their
order, and one can tell to the last bit which values the parameters must have after any number of
steps. With ``pattern`` an integer per element, ``n`` ranks and steps counted from one,

    parameter after t steps  =  pattern * (START - LR * sum_t)       sum_t a small integer
    momentum buffer          =  pattern * move_t                     move_t = sum_t - sum_(t-1)
    mean of the gradients    =  pattern * (move_t - momentum * move_(t-1))

Every rank's share of that mean is another one, except for one rank that makes up the rest.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from soonest.core.trace import Layer

if TYPE_CHECKING:
    from soonest.lab.replay import Replay

START = 64
"""Parameters begin as the pattern times this."""
LR = 0.25
"""The learning rate with which a replay must be trained."""

_READ_EVERY = 1021  # Elements between those that a forward pass reads, prime as well.


class ReplayLayer(nn.Module):
    """One layer of a replay.

    Args:
        replay: to which it belongs.
        index: of the layer.
        layer: its size and times.
        pattern: one integer per parameter.
        check: whether to make sure in every forward pass that the parameters have arrived.
    """

    weight: nn.Parameter | None

    def __init__(
        self, replay: Replay, index: int, layer: Layer, pattern: Tensor, check: bool
    ) -> None:
        super().__init__()
        self.name = layer.name
        self.index = index
        forward_overhead_s, backward_overhead_s = replay.overhead_s
        self.forward_s = layer.fwd_us * 1e-6 * replay.slow_motion - forward_overhead_s
        self.backward_s = layer.bwd_us * 1e-6 * replay.slow_motion - backward_overhead_s
        self.pace = replay.pace
        self.momentum = replay.momentum
        self.rounding = replay.rounding
        self.rank, self.ranks = replay.rank, replay.ranks
        self.check = check
        self.pattern = pattern
        self.steps = 0
        self._sent = 0.0
        weight = nn.Parameter(pattern * START) if pattern.numel() else None
        self.register_parameter("weight", weight)

    def forward(self, flow: Tensor) -> Tensor:
        # Touching the parameter may wait for it, which is not the time that computing takes.
        values = self.weight.detach() if self.weight is not None else None
        began_s = time.perf_counter()
        if self.check and values is not None:
            wrong = self._compare(values[::_READ_EVERY], self.steps, _READ_EVERY)
            if wrong:
                raise RuntimeError(
                    f"a forward pass read a parameter that is not there yet: {wrong}"
                )
        flow = _Compute.apply(flow, self.weight, self)  # pyright: ignore[reportAssignmentType]
        self.pace.fill(self.forward_s, began_s)
        return flow

    def compute_backward(self) -> Tensor | None:
        began_s = time.perf_counter()
        self.steps += 1
        if self.rounding:
            self._sent += sum(abs(self.share(rank)) for rank in range(self.ranks)) / self.ranks
        # A new tensor each time: autograd then hands it on as the gradient without a copy.
        gradient = self.pattern * self.share(self.rank) if self.weight is not None else None
        self.pace.fill(self.backward_s, began_s)
        return gradient

    def share(self, rank: int) -> float:
        """The factor of one rank's gradient in the current step, times the number of ranks."""
        if rank:
            return self.ranks * _mix(rank, self.steps, self.index)
        others = sum(_mix(other, self.steps, self.index) for other in range(1, self.ranks))
        move, before = self._move(self.steps), self._move(self.steps - 1)
        return self.ranks * (move - self.momentum * before - others)

    def verify(self, steps: int) -> str | None:
        return self._compare(self.weight.detach(), steps) if self.weight is not None else None

    def _sum(self, step: int) -> int:
        # Odd after even after odd: no two steps that follow each other have the same.
        return 2 * _mix(-1, step, self.index) + step % 2 if step > 0 else 0

    def _move(self, step: int) -> int:
        return self._sum(step) - self._sum(step - 1)

    def _compare(self, values: Tensor, steps: int, every: int = 1) -> str | None:
        expected = self.pattern[::every] * (START - LR * self._sum(steps))
        if torch.equal(values, expected):
            return None
        exact = self.ranks & (self.ranks - 1) == 0
        # Each gradient is rounded, and the sums, which are smaller than all gradients together
        # almost always. The errors add up, over the steps as well, in the momentum and besides.
        rounded = self.rounding * self._sent * LR / (1 - self.momentum)
        near = (0.0 if exact else 1e-4 * START) + rounded * self.pattern[::every]
        off = (~((values - expected).abs() <= near)).nonzero()[:, 0]
        if not len(off):
            return None
        at = int(off[0])
        return (
            f"after {steps} steps {len(off)} of {len(values)} elements looked at are wrong in "
            f"layer {self.name}, first number {at * every}: {float(values[at])!r} instead of "
            f"{float(expected[at])!r}"
        )


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flow: Tensor, weight: Tensor | None, layer: ReplayLayer) -> Tensor:
        ctx.layer = layer
        return flow.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return grads[0], ctx.layer.compute_backward(), None


def _mix(who: int, step: int, layer: int) -> int:
    """An integer from -7 to 8 that looks like chance and is the same everywhere."""
    mixed = (who * 40503 + step * 48271 + layer * 69621 + 12345) * 2654435761
    return (mixed >> 16) % 16 - 7
