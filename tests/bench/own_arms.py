"""Arms that are not soonest's own: a right one and a wrong one."""

from __future__ import annotations

import torch
import torch.distributed as dist

from soonest.bench.arms import Arm, Time, replayed
from soonest.bench.settings import Settings

WRONG_STEP = 2
SLIP = 2.0**-6


def right(settings: Settings, time: Time) -> Arm:
    return _by_hand(settings, slip=0.0)


def wrong(settings: Settings, time: Time) -> Arm:
    """Gets one element of one layer slightly wrong, once, on the last rank."""
    return _by_hand(settings, slip=SLIP)


def _by_hand(settings: Settings, slip: float) -> Arm:
    replay = replayed(settings)
    optimizer = replay.sgd()
    x = torch.zeros(1)

    def update(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        for parameter in replay.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= replay.ranks
        if replay.steps == WRONG_STEP and dist.get_rank() == replay.ranks - 1:
            last = list(replay.parameters())[-1]
            assert last.grad is not None
            last.grad[1] += slip  # not among those that every forward pass looks at
        optimizer.step()

    return Arm(replay, lambda: replay(x), update)
