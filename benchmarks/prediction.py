"""Predicted beside measured step times, on emulated hosts, for several ways of training.

Each cell is a model on so many hosts with links of some rate. The ranks calibrate the network, for
longer than `soonest.prioritize` does because emulated links are slow, and then train every arm in
turn; soonest with the plan that was made from that calibration, so that what is simulated is what
runs. From the calibration and the trace alone the simulator says how long a step of each arm takes:
nothing is fitted to the steps that it predicts. What an update takes is known from the arm that
does not communicate.

    sudo python benchmarks/prediction.py                # what has no record yet; hours for all
    python benchmarks/prediction.py --show              # only the table and the picture
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

STEPS, ROUNDS = 2, 3
CALIBRATION_S = 30.0
CALM = 1.5
"""Times the slow motion that this machine needs at the least, so that its cores hold nothing up."""
FLOOR = "prediction:calibrated"
"""The arm that does not communicate; it calibrates first."""
PLANNED = "prediction:planned"
"""soonest with the plan for that calibration."""
ARMS = {"sequential": "sequential", "ddp": "ddp", "soonest": PLANNED}
"""What is predicted, and the arms that are measured."""
HERE = Path(__file__).parent / "records"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--record", type=Path, default=HERE / "prediction.json")
    parser.add_argument("--picture", type=Path, default=HERE / "prediction.png")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--hosts", help="only so many, as in 2,4")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="turns of each arm (%(default)s)"
    )
    parser.add_argument("--only", help="cells whose names contain this")
    parser.add_argument("--again", action="store_true", help="also what has a record")
    args = parser.parse_args()
    cells: dict[str, Any] = json.loads(args.record.read_text()) if args.record.exists() else {}
    if not args.show:
        measure(cells, args)
    return show(cells, args.picture)


def measure(cells: dict[str, Any], args: argparse.Namespace) -> None:
    """Runs what has no record yet; writes each cell when it is done."""
    from soonest.bench import scale, session, suite
    from soonest.bench.settings import Settings, link_for
    from soonest.bench.show import Screen
    from soonest.core.trace import Trace

    hosts = [int(n) for n in args.hosts.split(",")] if args.hosts else suite.HOSTS
    chosen = [case for case in suite.cases(hosts=hosts) if (args.only or "") in key_of(case)]
    left = [case for case in chosen if args.again or key_of(case) not in cells]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    sys.path.insert(0, str(Path(__file__).parent))
    screen = Screen()
    capacities: dict[int, Any] = {}
    with screen.work():
        for number, case in enumerate(left, 1):
            screen.say(f"{case.title}: {number} of {len(left)}")
            if case.hosts not in capacities:
                capacities[case.hosts] = session.probe(case.hosts, say=screen.say)
            trace = Trace.load(case.trace)
            link_bps = link_for(trace, case.hosts, case.load)
            slow, shrink = scale.choose(trace, case.hosts, link_bps, capacities[case.hosts])
            arms = (FLOOR, *ARMS.values())
            settings = Settings(
                trace, case.hosts, link_bps, CALM * slow, shrink, arms, STEPS, args.rounds
            )
            with tempfile.TemporaryDirectory() as cache:  # each cell measures its own network
                os.environ["SOONEST_CACHE"] = cache
                result = session.run(settings, name=case.trace, say=screen.say, watch=screen.watch)
            record = {name: value for name, value in result.record.items() if name != "timelines"}
            cells[key_of(case)] = record
            found = predictions(record)
            line = ", ".join(
                f"{what} {record['arms'][arm]['step_ms']:.1f} measured, {found[what]:.1f} predicted"
                for what, arm in ARMS.items()
            )
            screen.say(f"{case.title}, ms: {line}")
            partial = args.record.with_suffix(".partial")
            partial.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
            partial.replace(args.record)


_networks: list[Any] = []
"""What was measured last by this process."""


def calibrated(settings: Any, time: Any) -> Any:
    """The arm ``FLOOR``, as ``bench.arms`` makes arms."""
    import torch
    import torch.distributed as dist

    from soonest.bench import arms
    from soonest.runtime.comm import groups
    from soonest.runtime.tuning import calibrate

    ranks = groups.ranks_of(groups.private_group(dist.group.WORLD, None))
    replay = arms.replayed(settings)
    largest = max(parameter.numel() * 4 for parameter in replay.parameters())
    enough = next((i for i, size in enumerate(calibrate.SIZES, 1) if size >= largest), None)
    network = calibrate.measure(
        ranks,
        methods=("allreduce",),
        device=torch.device("cpu"),
        budget_s=CALIBRATION_S,
        sizes=calibrate.SIZES[:enough],
    )
    _networks.append(network)
    arm = arms.local(settings, time)
    arm.note["network"] = network.to_json()
    return arm


def planned(settings: Any, time: Any) -> Any:
    """The arm ``PLANNED``."""
    import soonest
    from soonest.bench import arms

    replay = arms.replayed(settings)
    optimizer = replay.sgd()
    trace = scaled(settings.trace, settings.slow_motion, settings.shrink)
    plan = plan_for(trace, _networks[-1], ranks=settings.hosts)
    handle = soonest.prioritize(replay, optimizer, plan=plan)
    arm = arms.Arm.of(
        replay, replay, optimizer, flush=handle.flush, ready=lambda: handle.settled,
        timeline=handle.timeline, detach=handle.detach,
    )  # fmt: skip
    arm.note["network"] = _networks[-1].to_json()
    return arm


def scaled(trace: Any, slow_motion: float, shrink: float, update_s: float = 0.0) -> Any:
    """What a replay really computes and sends, with layers named as its modules are."""
    from soonest.core.forecast.predict import slowed

    layers = [
        replace(
            layer,
            name=f"layers.{number}",
            bytes=4 * max(1, round(layer.bytes / 4 / shrink)) if layer.bytes else 0,
        )
        for number, layer in enumerate(trace.layers)
    ]
    return slowed(replace(trace, layers=tuple(layers), update_us=update_s * 1e6), slow_motion)


def plan_for(trace: Any, network: Any, *, ranks: int) -> Any:
    """The plan that soonest runs, and that is simulated."""
    from soonest.core.plan import Flat
    from soonest.core.planner.planner import make_plan

    sizes = [(f"{one.name}.weight", one.name, one.bytes // 4) for one in trace.layers if one.bytes]
    flats = (Flat.lay_out("float32", 4, sizes),)
    return make_plan(trace, flats, network, ranks=ranks)


def key_of(case: Any) -> str:
    return f"{case.trace}-{case.hosts}-hosts-{case.load:g}x"


def predictions(record: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of a step in the trace's own time, by arm.

    Args:
        record: of a comparison, as ``soonest.bench.result.record_of`` makes it.
    """
    from soonest.core.cost import Network
    from soonest.core.forecast import baselines
    from soonest.core.simulator.simulate import step_time_s
    from soonest.core.trace import Trace

    slow, shrink, ranks = record["slow_motion"], record["shrink"], record["hosts"]
    floor = record["arms"][FLOOR]
    # Updates are really made, but not in slow motion.
    update_s = max(0.0, floor["step_ms"] - record["compute_ms"]) * slow / 1e3
    trace = Trace.load(record["trace"])
    network = Network.from_json(floor["network"])
    planned_for = Network.from_json(record["arms"][PLANNED]["network"])
    plan = plan_for(scaled(trace, slow, shrink), planned_for, ranks=ranks)
    trace = scaled(trace, slow, shrink, update_s)
    caps_mb = [mb / shrink for mb in baselines.SWEEP_MB["default"]]
    found_s = {
        "sequential": baselines.sequential(trace, network, ranks=ranks).step_s,
        "ddp": baselines.ddp(trace, network, ranks=ranks, caps_mb=caps_mb).step_s,
        "soonest": step_time_s(trace, plan, network),
    }
    return {arm: step_s * 1e3 / slow for arm, step_s in found_s.items()}


def show(cells: Mapping[str, Any], picture: Path) -> int:
    from rich.console import Console
    from rich.table import Table

    from soonest.report.predicted import Pair, draw

    table = Table("cell", *(f"{arm}: measured, predicted, ms" for arm in ARMS))
    pairs: list[Pair] = []
    for name, record in cells.items():
        found = predictions(record)
        cells_of_row: list[str] = []
        for what, arm in ARMS.items():
            pair = Pair(what, name, record["arms"][arm]["step_ms"], found[what])
            pairs.append(pair)
            cells_of_row.append(
                f"{pair.measured_ms:.1f}  {pair.predicted_ms:.1f}  {pair.error:+.1%}"
            )
        table.add_row(name, *cells_of_row)
    if not pairs:
        print("no cell has a record yet", file=sys.stderr)
        return 1
    Console(width=140).print(table)
    for arm in ARMS:
        print(f"{arm}: {errors_of([pair for pair in pairs if pair.arm == arm])}")
    print(f"all {len(cells)} cells: {errors_of(pairs)}")
    print(f"The picture is in {draw(pairs, picture)}")
    return 0


def errors_of(pairs: Sequence[Any]) -> str:
    off = sorted(abs(pair.error) for pair in pairs)
    return f"median error {statistics.median(off):.1%}, worst {off[-1]:.1%}"


if __name__ == "__main__":
    sys.exit(main())
