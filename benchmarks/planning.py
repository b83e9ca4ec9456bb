"""How long planning and simulating take, on one core.

python benchmarks/planning.py --json benchmarks/records/planning.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from soonest.core.cost import Network
from soonest.core.forecast import fabrics
from soonest.core.forecast.predict import Scenario, row_of
from soonest.core.plan import METHODS, Bucket, Op, Plan
from soonest.core.planner.planner import best_plan, flats_of
from soonest.core.simulator.cluster import simulate_ranks
from soonest.core.simulator.simulate import simulate
from soonest.core.trace import Layer, Trace


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--times", type=int, default=7, help="of which the median (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the record")
    args = parser.parse_args()
    found: dict[str, float] = {}
    for what, run in work().items():
        run()  # caches of the interpreter
        found[what] = statistics.median(timed(run) for _ in range(args.times))
        print(f"{what}: {1e3 * found[what]:.1f} ms", flush=True)
    if args.json:
        machine = {"cores": os.cpu_count(), "python": sys.version.split()[0]}
        record = {"machine": machine, "median_s": found}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def work() -> dict[str, Callable[[], object]]:
    many = uneven(1000)
    whole, halves = one_bucket_each(many, "allreduce", 16), one_bucket_each(many, "shard", 16)
    network = Network.ideal(16, 12e9, 2e-5)  # sharing takes as long as computing
    large = Network.ideal(4096, 20e9, 2e-5)
    vgg16 = Trace.load("vgg16")
    scenario = Scenario(vgg16, fabrics.named("25gbe"))
    plan = best_plan(vgg16, flats_of(vgg16), large, ranks=4096)

    def planned(*methods: str) -> Plan:
        return best_plan(many, flats_of(many), network, ranks=16, methods=methods)

    return {
        "a step of 1,000 buckets": lambda: simulate(many, whole, network),
        "a step of 1,000 buckets of two ops each": lambda: simulate(many, halves, network),
        "a row of the prediction, five ways of training on 4,096 ranks": lambda: row_of(
            scenario, 4096
        ),
        "ten steps on 4,096 ranks that differ": lambda: simulate_ranks(
            vgg16, plan, large, stragglers={7: 1.2}, jitter=0.05
        ),
        "two steps of 1,000 buckets on such ranks": lambda: simulate_ranks(
            many, replace(whole, ranks=4096), large, stragglers={7: 1.2}, jitter=0.05, steps=1
        ),
        "a plan for 1,000 tensors, one method": lambda: planned("allreduce"),
        "a plan for 1,000 tensors, three methods": lambda: planned(
            "allreduce", "exchange", "split"
        ),
    }


def uneven(count: int) -> Trace:
    """Layers of 1 kB to 10 MB."""
    draw = random.Random(1)
    layers = (
        Layer(str(i), int(10 ** draw.uniform(3, 7)), draw.uniform(0, 900), draw.uniform(0, 1800))
        for i in range(count)
    )
    return Trace("uneven", tuple(layers), 500.0)


def one_bucket_each(trace: Trace, method: str, ranks: int) -> Plan:
    """A plan with a bucket per layer, sent as they become ready, shared as they are needed."""
    (flat,) = flats_of(trace)
    borders = [*(slot.start for slot in flat.slots), flat.numel]
    buckets = tuple(
        Bucket(0, start, stop, method, (slot.layer,))
        for slot, (start, stop) in zip(flat.slots, pairwise(borders), strict=True)
    )
    first, *second = METHODS[method]
    ops = [Op(index, first) for index in reversed(range(len(buckets)))]
    ops += [Op(index, kind) for kind in second for index in range(len(buckets))]
    return Plan(ranks, (flat,), buckets, tuple(ops))


if __name__ == "__main__":
    sys.exit(main())
