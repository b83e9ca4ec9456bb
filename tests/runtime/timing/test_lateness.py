"""The rank that is late is named in a running job."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import soonest
from helpers.ranks import run_ranks
from helpers.steering import keep_to_the_usual_plan, net
from soonest.runtime.timing import lateness

SLOW = 2


class Slow(nn.Module):
    """Takes so many seconds longer, forward and backward."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        if x.requires_grad:
            x.register_hook(lambda _: time.sleep(self.seconds))
        return x


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("soonest").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def trained(slow_s: float, form: str, steps: int = 45) -> dict[str, Any]:
    keep_to_the_usual_plan()
    lines = Lines()
    layers = list(net())
    pause_s = 0.02 + (slow_s if dist.get_rank() == SLOW else 0.0)
    model = nn.Sequential(*layers[:2], Slow(pause_s / 2), *layers[2:])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle: Any = None
    if form == "ddp":
        trains: nn.Module = soonest.DistributedDataParallel(model)
    else:
        trains = model
        handle = soonest.prioritize(model, optimizer, shard_optimizer=form == "sharded")
    data = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        x = torch.randn(6, 8, generator=data)
        optimizer.zero_grad()
        trains(x).square().sum().backward()
        if form == "barrier":
            dist.barrier()
        optimizer.step()
    if handle is None:
        handle = trains.reducer.handle  # type: ignore[union-attr]
    handle.flush()
    timeline = handle.timeline()
    found = {
        "names": handle.engine.failures.names,
        "last": handle.report().notes[-1],
        "history": [line for line in handle.history if " late" in line],
        "note": timeline.note if timeline else None,
        "lines": lines.lines,
        "sum": sum(float(p.detach().sum()) for p in model.parameters()),
    }
    handle.detach()
    return found


@pytest.mark.parametrize("form", ["plain", "sharded", "ddp", "barrier"])
def test_a_rank_that_computes_longer_is_named(form: str) -> None:
    ranks = run_ranks(trained, 3, 0.04, form)
    name = ranks[0]["names"][SLOW]
    assert name.startswith(f"rank {SLOW} (host ")
    for rank, found in enumerate(ranks):
        assert found["last"].startswith(f"{name} is late since step "), found["last"]
        assert "its compute takes" in found["last"]
        assert "this costs up to" in found["last"]
        assert len(found["history"]) == 1
        assert found["history"] == ranks[0]["history"]
        assert found["note"] == found["last"]
        told = [line for line in found["lines"] if name in line]
        assert len(told) == (rank == 0), "the first rank logs it, once"


def test_equal_ranks_are_not_late() -> None:
    for found in run_ranks(trained, 3, 0.0, "plain"):
        assert found["last"].startswith("no rank is late, as of step ")
        assert found["history"] == found["lines"] == []
        assert found["note"] == ""


def shortly() -> list[str]:
    return [trained(0.0, "plain", steps=steps)["last"] for steps in (9, 25)]


def test_before_it_is_known_that_is_said() -> None:
    assert run_ranks(shortly, 2)[0] == [
        "which rank is late is not known before step 15",
        "no rank is late, as of step 20",
    ]


def breaks() -> tuple[bool, bool]:
    """What cannot be measured or told is no matter of training."""
    without = trained(0.0, "plain")["sum"]

    def fails(*_: Any) -> Any:
        raise ValueError("no numbers")

    lateness.Straggler.look = fails  # type: ignore[method-assign]
    found = trained(0.0, "plain")
    return found["sum"] == without, "not known" in found["last"]


def test_what_fails_there_fails_no_training() -> None:
    assert run_ranks(breaks, 2) == [(True, True)] * 2


def in_turn(steps: int) -> list[str]:
    """Log and history of a rank that is late and not late by turns."""
    now = 0.0
    lateness.now_s = lambda: now
    lines = Lines()
    failures: Any = type("Peers", (), {"names": ["rank 0", "rank 1"], "ends": ({}, {})})()
    history: list[str] = []
    watch = lateness.Lateness(dist.group.WORLD, failures, history)  # type: ignore[arg-type]
    mine_s = 0.1 * (1 + dist.get_rank())
    for step in range(steps):
        late = step % 100 >= 50
        watch.begins()
        now += mine_s if late else 0.1
        watch.ends()
        while watch._under_way and not watch._under_way[0][1]._work.is_completed():
            time.sleep(1e-3)
    return [history, lines.lines]  # type: ignore[list-item]


def test_log_and_history_stay_short_however_often_it_changes() -> None:
    (history, lines), (other, silent) = run_ranks(in_turn, 2, 3500)
    assert history == other
    assert len(history) == lateness._MOST_TOLD
    assert "rank 1 is late since step 51: its compute takes 200 ms" in history[0]
    assert history[1].endswith("rank 1 is no longer late")
    assert silent == []
    # 3500 steps of 0.1 s on the first rank: half a line each 300 s.
    assert lines, "the first rank logs"
    assert len(lines) <= 1 + 3500 * 0.1 / lateness._LOG_PAUSE_S
