"""Plans that take turns by a clock that the tests move, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

import soonest
from soonest.core.plan import Plan
from soonest.runtime.tuning import autotuner, trials

StepTime = Callable[[int, Plan], float]
"""How long a step under a plan is to seem to take, seconds, by its number."""


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(8, 600), nn.Linear(600, 64), nn.Linear(64, 600), nn.Linear(600, 4)
    )


def keep_to_the_usual_plan() -> None:
    """No other has a turn from now on, in this process."""
    trials.CANDIDATES = trials.CANDIDATES[:1]


class Steered:
    """A prioritized model whose steps seem to take as long as one likes.

    Attributes:
        plans: after each step, the plan in use.
        settled: the same of ``handle.settled``.
    """

    def __init__(self, step_s: StepTime, *, shard_optimizer: bool = False) -> None:
        self.model = net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.handle = soonest.prioritize(
            self.model, self.optimizer, shard_optimizer=shard_optimizer
        )
        self.plans: list[Plan] = []
        self.settled: list[bool] = []
        self._data = torch.Generator().manual_seed(dist.get_rank())
        self._now_s = 0.0

        def now_s() -> float:
            """Asked once at the end of each step, before the plan changes."""
            assert self.handle.plan is not None
            self._now_s += step_s(len(self.plans) + 1, self.handle.plan)
            return self._now_s

        autotuner.now_s = now_s

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            x = torch.randn(6, 8, generator=self._data)
            self.model(x).square().sum().backward()
            self.optimizer.step()
            assert self.handle.plan is not None
            self.plans.append(self.handle.plan)
            self.settled.append(self.handle.settled)

    def skip(self, steps: int) -> None:
        """Leaves out the data of so many steps."""
        for _ in range(steps):
            torch.randn(6, 8, generator=self._data)

    def settle(self) -> None:
        while not self.handle.settled:
            self.train(1)

    def values(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}
