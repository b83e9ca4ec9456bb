"""Whether the rank that is late is named, by the right cause, and by how many steps; and the cost.

Four emulated hosts train a replayed AlexNet, whose sharing takes about as long as its computing.
In some runs one host's link is set to a third of its rate while it trains, in others one host's
compute takes 1.5 times as long from some step on, and in the rest nothing happens. All ranks must
name the same rank. The cost is the time that the training loop's own thread spends in measuring and
comparing.

    python benchmarks/straggler.py --json benchmarks/records/straggler.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HOSTS, LINK_BPS = 4, 200e6
SLOW_MOTION, SHRINK = 4.0, 120.0
SLOW_LINK, SLOW_COMPUTE = 1 / 3, 1.5
QUIET_STEPS, LATE_STEPS = 40, 60
NAMED_WITHIN = 50
REAL_STEP_MS = 30.2
"""Of AlexNet on four hosts without slow motion, as in the README."""
KINDS = ("link", "compute", "quiet")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--late", type=int, default=2, help="runs of each cause (%(default)s)")
    parser.add_argument("--quiet", type=int, default=10, help="runs without (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--as-rank", nargs=2, metavar=("KIND", "SLOW"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        return as_rank(args.as_rank[0], int(args.as_rank[1]))
    began_s = time.monotonic()
    runs = [
        run(kind, (2 * number + 1) % HOSTS)
        for kind in KINDS
        for number in range(args.quiet if kind == "quiet" else args.late)
    ]
    record = {
        "hosts": HOSTS,
        "link_bps": LINK_BPS,
        "slow_link": SLOW_LINK,
        "slow_compute": SLOW_COMPUTE,
        "named_within_steps": {
            kind: max((one["within"] for one in runs if one["kind"] == kind), default=None)
            for kind in ("link", "compute")
        },
        "false_alarms": sum(len(one["history"]) for one in runs if one["kind"] == "quiet"),
        "quiet_runs": args.quiet,
        "cost_us": statistics.median(one["cost_us"] for one in runs),
        "share_of_step": max(one["cost_us"] / 1e3 / one["step_ms"] for one in runs),
        "share_of_real_step": statistics.median(one["cost_us"] for one in runs)
        / 1e3
        / REAL_STEP_MS,
        "took_s": time.monotonic() - began_s,
        "runs": runs,
    }
    print(json.dumps({key: value for key, value in record.items() if key != "runs"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    right = all(one["right"] for one in runs)
    return 0 if right else 1


def run(kind: str, slow: int) -> dict[str, Any]:
    """One training, in which one host comes to be late, or none does."""
    from soonest.lab import Lab
    from soonest.lab.messages import listen

    told: dict[int, dict[str, Any]] = {}
    with Lab(HOSTS, LINK_BPS) as lab:

        def take(rank: int, message: dict[str, Any]) -> None:
            if message["kind"] == "now":
                lab.set_link(slow, LINK_BPS * SLOW_LINK)
            else:
                told[rank] = message

        command = [sys.executable, __file__, "--as-rank", kind, str(slow)]
        listen(lab, command, take, say=print, timeout_s=300)
    mine = told[0]
    named = mine["named_at"] - mine["from"] if mine["named_at"] is not None else None
    right = all(one["history"] == mine["history"] for one in told.values())
    if kind == "quiet":
        right &= not mine["history"]
    else:
        right &= named is not None and 0 < named <= NAMED_WITHIN
        right &= [mine["rank"], mine["cause"]] == [slow, kind] and len(mine["history"]) == 1
    found = {
        "kind": kind,
        "slow": None if kind == "quiet" else slow,
        "right": bool(right),
        "within": named,
        "history": mine["history"],
        "says": mine["says"],
        "step_ms": mine["step_ms"],
        "cost_us": statistics.mean(one["cost_us"] for one in told.values()),
    }
    print(json.dumps(found), flush=True)
    return found


# The ranks


def as_rank(kind: str, slow: int) -> int:
    import torch
    import torch.distributed as dist

    import soonest
    from soonest.core.trace import Trace
    from soonest.lab.messages import tell
    from soonest.lab.replay import Replay, measure_overhead_s
    from soonest.runtime.lateness import Lateness

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    spent_s = 0.0

    def timed(method: Any) -> Any:
        def call(self: Lateness) -> None:
            nonlocal spent_s
            began_s = time.perf_counter()
            method(self)
            spent_s += time.perf_counter() - began_s

        return call

    Lateness.begins = timed(Lateness.begins)  # type: ignore[method-assign]
    Lateness.ends = timed(Lateness.ends)  # type: ignore[method-assign]
    trace = Trace.load("alexnet")
    overhead_s = measure_overhead_s(trace, SLOW_MOTION, SHRINK)
    replay = Replay(trace, SLOW_MOTION, SHRINK, overhead_s=overhead_s)
    optimizer = replay.sgd()
    handle = soonest.prioritize(replay, optimizer)
    x = torch.zeros(1)
    steps = 0

    def train(number: int) -> None:
        nonlocal steps
        for _ in range(number):
            loss = replay(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1

    while not handle.settled:
        train(1)
    train(QUIET_STEPS)
    since, rank = steps, dist.get_rank()
    before_s, began_s = spent_s, time.perf_counter()
    if kind == "link" and rank == 0:
        tell("now")
    if kind == "compute" and rank == slow:
        for layer in replay.layers:
            layer.forward_s *= SLOW_COMPUTE  # type: ignore[operator]
            layer.backward_s *= SLOW_COMPUTE  # type: ignore[operator]
    named_at = None
    lateness = handle.engine.backward.lateness  # type: ignore[union-attr]
    for _ in range(LATE_STEPS):
        train(1)
        if named_at is None and lateness.late is not None:
            named_at = steps
    handle.flush()
    took_s = time.perf_counter() - began_s
    named = lateness._straggler.named
    tell(
        "done",
        **{"from": since},
        named_at=named_at,
        rank=named.rank if named else None,
        cause=named.cause if named else None,
        says=handle.report().notes[-1],  # type: ignore[union-attr]
        history=[line for line in handle.history if " late" in line],
        step_ms=took_s / LATE_STEPS * 1e3,
        cost_us=(spent_s - before_s) / LATE_STEPS * 1e6,
    )
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
