"""Whether the rank that is late is named, by the right cause, and by how many steps; and the cost.

Four emulated hosts train a replayed AlexNet, whose sharing takes about as long as its computing.
In some runs one host's link is set to a third of its rate while it trains, in others one host's
compute takes 1.5 times as long from some step on, and in the rest nothing happens. All ranks must
name the same rank. The cost is what the training loop's own thread computes for it. All runs are in
the same processes, one after the other, each with a model and a handle of its own.

    python benchmarks/straggler.py --json benchmarks/records/straggler.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTS, LINK_BPS = 4, 150e6
SLOW_MOTION, SHRINK = 4.0, 160.0
SLOW_LINK, SLOW_COMPUTE = 1 / 3, 1.5
QUIET_STEPS, LATE_STEPS = 25, 50
NAMED_WITHIN = 50
REAL_STEP_MS = 30.2
"""Of AlexNet on four hosts without slow motion, as in the README."""
KINDS = ("link", "compute", "quiet")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--late", type=int, default=2, help="runs of each cause (%(default)s)")
    parser.add_argument("--quiet", type=int, default=10, help="runs without (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        return as_rank(json.loads(args.as_rank))
    began_s = time.monotonic()
    asked = [
        (kind, (2 * number + 1) % HOSTS)
        for kind in KINDS
        for number in range(args.quiet if kind == "quiet" else args.late)
    ]

    def keep(runs: list[dict[str, Any]]) -> None:
        """What is known so far, in case that this is ended."""
        record = {**summary(runs), "took_s": time.monotonic() - began_s, "runs": runs}
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    runs = measured(asked, keep)
    print(json.dumps(summary(runs), indent=1))
    return 0 if all(run["right"] for run in runs) else 1


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    cost_us = statistics.median(run["cost_us"] for run in runs)
    return {
        "hosts": HOSTS,
        "link_bps": LINK_BPS,
        "slow_link": SLOW_LINK,
        "slow_compute": SLOW_COMPUTE,
        "named_within_steps": {
            kind: max((run["within"] or 1000 for run in runs if run["kind"] == kind), default=None)
            for kind in ("link", "compute")
        },
        "quiet_runs": sum(run["kind"] == "quiet" for run in runs),
        "false_alarms": sum(len(run["history"]) for run in runs if run["kind"] == "quiet"),
        "cost_us_a_step": cost_us,
        "share_of_step": max(run["cost_us"] / 1e3 / run["step_ms"] for run in runs),
        "share_of_real_step": cost_us / 1e3 / REAL_STEP_MS,
    }


def measured(
    asked: list[tuple[str, int]], keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Trains once for each kind of run and the host that is late in it; keeps what is known."""
    from soonest.lab import Lab
    from soonest.lab.messages import listen

    told: dict[int, dict[int, dict[str, Any]]] = {}
    runs: list[dict[str, Any]] = []
    with Lab(HOSTS, LINK_BPS) as lab:

        def take(rank: int, message: dict[str, Any]) -> None:
            number = message["number"]
            if message["kind"] == "link":
                lab.set_link(asked[number][1], LINK_BPS * message["factor"])
                return
            told.setdefault(number, {})[rank] = message
            if len(told[number]) == HOSTS:
                kind, slow = asked[number]
                runs.append(judged(kind, slow, told[number]))
                print(json.dumps(runs[-1]), flush=True)
                keep(runs)

        command = [sys.executable, __file__, "--as-rank", json.dumps(asked)]
        listen(lab, command, take, say=print, timeout_s=1200)
    return runs


def judged(kind: str, slow: int, told: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What all ranks found in one run, and whether it is right."""
    mine = told[0]
    within = mine["named_at"] - mine["from"] if mine["named_at"] is not None else None
    right = all(one["history"] == mine["history"] for one in told.values())
    if kind == "quiet":
        right &= not mine["history"]
    else:
        right &= within is not None and 0 < within <= NAMED_WITHIN
        right &= [mine["rank"], mine["cause"]] == [slow, kind] and len(mine["history"]) == 1
    return {
        "kind": kind,
        "slow": None if kind == "quiet" else slow,
        "right": right,
        "within": within,
        "history": mine["history"],
        "step_ms": mine["step_ms"],
        "cost_us": statistics.mean(one["cost_us"] for one in told.values()),
    }


# The ranks


def as_rank(asked: list[tuple[str, int]]) -> int:
    import torch
    import torch.distributed as dist

    from soonest.core.trace import Trace
    from soonest.lab.replay import measure_overhead_s
    from soonest.runtime.tuning import trials

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    trials.CANDIDATES = trials.CANDIDATES[:1]  # Turns of other plans would only take time.
    trace = Trace.load("alexnet")
    overhead_s = measure_overhead_s(trace, SLOW_MOTION, SHRINK)
    spent = Spent()
    for number, (kind, slow) in enumerate(asked):
        one_run(trace, overhead_s, spent, number, kind, slow)
    dist.barrier()
    dist.destroy_process_group()
    return 0


class Spent:
    """Counts the seconds that the thread which trains computes for finding out who is late."""

    def __init__(self) -> None:
        from soonest.runtime.timing.lateness import Lateness

        self.seconds = 0.0
        for name in ("begins", "ends"):
            setattr(Lateness, name, self._timed(getattr(Lateness, name)))

    def _timed(self, method: Any) -> Any:
        def call(lateness: Any) -> None:
            began_s = time.thread_time()
            method(lateness)
            self.seconds += time.thread_time() - began_s

        return call


def one_run(
    trace: Any, overhead_s: tuple[float, float], spent: Spent, number: int, kind: str, slow: int
) -> None:
    import torch
    import torch.distributed as dist

    import soonest
    from soonest.lab.messages import tell
    from soonest.lab.replay import Replay

    rank, steps = dist.get_rank(), 0
    replay = Replay(trace, SLOW_MOTION, SHRINK, overhead_s=overhead_s)
    optimizer = replay.sgd()
    handle = soonest.prioritize(replay, optimizer)
    assert handle.engine is not None
    lateness = handle.engine.backward.lateness
    assert lateness is not None
    x = torch.zeros(1)

    def train() -> None:
        nonlocal steps
        loss = replay(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1

    for _ in range(QUIET_STEPS):
        train()
    since, before_s, began_s = steps, spent.seconds, time.perf_counter()
    if kind == "link" and rank == 0:
        tell("link", number=number, factor=SLOW_LINK)
    if kind == "compute" and rank == slow:
        for layer in replay.layers:
            layer.forward_s *= SLOW_COMPUTE  # pyright: ignore[reportOperatorIssue,reportArgumentType]
            layer.backward_s *= SLOW_COMPUTE  # pyright: ignore[reportOperatorIssue,reportArgumentType]
    named_at = None
    for _ in range(LATE_STEPS):
        train()
        if named_at is None and lateness.late is not None:
            named_at = steps
    handle.flush()
    took_s = time.perf_counter() - began_s
    named = lateness._straggler.named
    tell(
        "done",
        number=number,
        **{"from": since},
        named_at=named_at,
        rank=named.rank if named else None,
        cause=named.cause if named else None,
        history=[line for line in handle.history if " late" in line],
        step_ms=took_s / LATE_STEPS * 1e3,
        cost_us=(spent.seconds - before_s) / LATE_STEPS * 1e6,
    )
    if kind == "link" and rank == 0:
        tell("link", number=number, factor=1.0)
    handle.detach()
    dist.barrier()


if __name__ == "__main__":
    sys.exit(main())
