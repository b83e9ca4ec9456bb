"""A model's compute replayed: real parameters and gradients, with sleeps in place of arithmetic.

What its values must be is in ``replay_layer``, and how it keeps time in ``pace``.
"""

from __future__ import annotations

import time
import zlib

import torch
from torch import Tensor, nn

from soonest.core.trace import Layer, Trace
from soonest.lab.pace import Pace
from soonest.lab.replay_layer import LR, ReplayLayer

_PERIOD = 61  # Odd and prime: a slice put in a wrong place shows, as slices start at even numbers.


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
        """By which fraction all computing so far took longer than was asked for."""
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


def _numel(layer: Layer, shrink: float) -> int:
    return max(1, round(layer.bytes / 4 / shrink)) if layer.bytes else 0
