"""A model's compute replayed: real parameters and gradients, with sleeps in place of arithmetic.

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
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from soonest.core.trace import Layer, Trace

START = 64
"""Parameters begin as the pattern times this."""
LR = 0.25
"""The learning rate with which a replay must be trained."""

_PERIOD = 61  # Odd and prime: a slice put in a wrong place shows, as slices start at even numbers.
_READ_EVERY = 1021  # Elements between those that a forward pass reads, prime as well.


class Replay(nn.Module):
    """A module that takes a trace's times and has its parameters, but computes nothing.

    It has a sub-module ``layers[i]`` per layer of the trace, with a float32 parameter ``weight``
    if the layer has any bytes. It is trained as any module; each step must call ``backward`` once::

        replay(x).backward()

    Args:
        trace: whose layers to replay.
        slow_motion: every time is multiplied by it.
        shrink: every number of parameters is divided by it; at least one is left.
        momentum: that of the SGD which trains it; a multiple of 1/16, so that all is exact.
        alone: whether gradients are not reduced over the ranks, so that each rank makes the
            mean by itself; by default this is so if no process group exists.
        check: whether every forward pass makes sure that the parameters it reads have arrived.
        rounding: the largest relative error of one rounding of what is reduced, where it is
            rounded on the way; 0.0 if it is not.
        overhead_s: what a layer takes besides, forward and backward, as ``measure_overhead_s``
            finds it; layers sleep less by that.

    Raises:
        ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        trace: Trace,
        slow_motion: float = 1.0,
        shrink: float = 1.0,
        *,
        momentum: float = 0.0,
        alone: bool | None = None,
        check: bool = False,
        rounding: float = 0.0,
        overhead_s: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        if not slow_motion > 0 or not shrink > 0:
            raise ValueError(
                f"slow_motion is {slow_motion!r} and shrink {shrink!r}, both must be above zero"
            )
        if not 0 <= momentum < 1 or momentum * 16 % 1:
            raise ValueError(f"momentum is {momentum!r}, but must be a multiple of 1/16 below 1")
        self.trace = trace
        self.slow_motion = slow_motion
        self.shrink = shrink
        self.momentum = momentum
        self.rounding = rounding
        self.overhead_s = overhead_s
        self.pace = Pace()
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        alone = not distributed if alone is None else alone
        self.rank = 0 if alone else torch.distributed.get_rank()
        self.ranks = 1 if alone else torch.distributed.get_world_size()
        sizes = [_numel(layer, shrink) for layer in trace.layers]
        # One pattern serves all layers, as their gradients differ by a factor.
        pattern = (torch.arange(max(sizes)) % _PERIOD + 1).float()
        self.layers = nn.ModuleList(
            ReplayLayer(self, index, layer, pattern[:size], check)
            for index, (layer, size) in enumerate(zip(trace.layers, sizes, strict=True))
        )

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Sleeps for the forward time of all layers.

        Args:
            x: any input; only kept for the sake of loops that give one.

        Returns:
            A scalar zero, whose ``backward`` sleeps for the backward time.
        """
        del x
        # Requires a gradient, so that layers without parameters have a backward pass as well.
        flow = torch.zeros((), requires_grad=True)
        for layer in self.layers:
            flow = layer(flow)
        return flow

    def sgd(self, *, fused: bool = True) -> torch.optim.SGD:
        """A new optimizer of the kind that ``verify`` expects."""
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=self.momentum, fused=fused)

    @property
    def steps(self) -> int:
        """Backward passes so far."""
        return self.layers[0].steps  # pyright: ignore[reportReturnType]

    @property
    def error(self) -> float:
        """By which share all computing so far took longer than was asked for."""
        asked_s = self.steps * self.slow_motion * (self.trace.forward_s + self.trace.backward_s)
        return self.pace.late_s / asked_s if asked_s else 0.0

    def verify(self, steps: int | None = None) -> str | None:
        """Whether all parameters are those that ``sgd`` must have made of them.

        With a number of ranks that is no power of two, the mean itself is rounded, and so the
        parameters need only be right within rounding.

        Args:
            steps: after how many steps; by default after as many as there were backward passes.

        Returns:
            None if all is right, or which layer is wrong and how, one sentence.
        """
        for layer in self.layers:
            if wrong := layer.verify(self.steps if steps is None else steps):  # pyright: ignore
                return wrong
        return None

    def checksum(self) -> int:
        """Of all parameters: equal if they are, to the last bit."""
        sum_ = 0
        for parameter in self.parameters():
            sum_ = zlib.crc32(parameter.detach().numpy().tobytes(), sum_)
        return sum_


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


class Pace:
    """Sleeps such that their sum is right: what one takes too long, the next ones give back.

    Attributes:
        late_s: how much has still to be given back. It only grows where making the gradients takes
            longer than the layers may take, and then the times are not those asked for.
    """

    def __init__(self) -> None:
        self.late_s = 0.0

    def fill(self, length_s: float, began_s: float) -> None:
        """Sleeps until ``length_s`` have passed since ``began_s``, less what was late before."""
        wanted_s = length_s - self.late_s
        left_s = began_s + wanted_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        self.late_s = time.perf_counter() - began_s - wanted_s


def measure_overhead_s(
    trace: Trace, slow_motion: float, shrink: float, *, times: int = 3
) -> tuple[float, float]:
    """What torch takes per layer of a replay around its sleeps: forward and backward, seconds.

    The least of several times counts, as whatever else runs on this machine only adds to it.

    Args:
        trace, slow_motion, shrink: of the replay.
        times: how often to measure.
    """
    replay = Replay(trace, slow_motion, shrink, alone=True)
    optimizer = replay.sgd()
    spent_s: list[tuple[float, float]] = []
    for _ in range(times):
        began_s = time.perf_counter()
        loss = replay()
        turned_s = time.perf_counter()
        optimizer.zero_grad()
        loss.backward()
        spent_s.append((turned_s - began_s, time.perf_counter() - turned_s))
        optimizer.step()
    forward_s, backward_s = (min(every) for every in zip(*spent_s, strict=True))
    layers = len(trace.layers)
    return (
        max(0.0, forward_s - slow_motion * trace.forward_s) / layers,
        max(0.0, backward_s - slow_motion * trace.backward_s) / layers,
    )


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flow: Tensor, weight: Tensor | None, layer: ReplayLayer) -> Tensor:
        ctx.layer = layer
        return flow.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return grads[0], ctx.layer.compute_backward(), None


def _numel(layer: Layer, shrink: float) -> int:
    return max(1, round(layer.bytes / 4 / shrink)) if layer.bytes else 0


def _mix(who: int, step: int, layer: int) -> int:
    """An integer from -7 to 8 that looks like chance and is the same everywhere."""
    mixed = (who * 40503 + step * 48271 + layer * 69621 + 12345) * 2654435761
    return (mixed >> 16) % 16 - 7
