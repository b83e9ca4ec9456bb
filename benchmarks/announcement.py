"""The table of Fujitsu Laboratories' announcement of August 2016: AlexNet, fixed global batch.

It said that the same training ran 14.7 times as fast on 16 GPUs as on one, and 27 times on 64.
Conventional software reached 10.07 and 15.79. The hardware was never published, but these two
numbers pin a model. With one GPU's step as the unit of time,

    conventional(n) = 1/n + C(n)             C(n) = 2 (n-1) a + 2 (n-1)/n b

Layer by layer the latency of C is paid once for each of the L layers with parameters, so a message
takes a/L. Nothing else is assumed or tuned: the trace of AlexNet says how the 1/n of computing is
made up, and what each way of combining costs follows from the messages and bytes that it takes.

    python benchmarks/announcement.py --simulate \\
        --json benchmarks/records/announcement-simulated.json
    sudo python benchmarks/announcement.py --lab --hosts 16 --slow-motion 1500 --shrink 64 \\
        --steps 3 --json benchmarks/records/announcement-lab-16.json
    sudo python benchmarks/announcement.py --lab --hosts 64 --slow-motion 10000 --shrink 64 \\
        --steps 3 --link 4.3tbit --arms sequential,ddp-tuned,soonest \\
        --json benchmarks/records/announcement-lab-64.json

`--lab` trains with real processes on emulated hosts. The rate of the links is sought at which
`sequential` gets as far as the model says on the first number of hosts, within three percent. Then
all ways of training take turns, there and on the other numbers of hosts, on links of that rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soonest.core.cost import Network
from soonest.core.forecast import baselines
from soonest.core.forecast.predict import slowed
from soonest.core.planner.bounds import lower_bound_s
from soonest.core.planner.planner import best_plan, flats_of
from soonest.core.simulator.simulate import step_time_s
from soonest.core.trace import Trace
from soonest.core.units import parse_rate, rate_text

if TYPE_CHECKING:
    from soonest.bench.show import Screen

A, B = 9.574e-5, 1.8105e-2
"""Latency of one message in each layer's ring, all layers together, and time of all bytes once."""
GPUS = (16, 64)
FUJITSU = {16: 14.7, 64: 27.0}

NEAR = 0.03
"""So near must ``sequential`` come to the model before the others are measured."""
TRIES = 6
ARMS = {
    "sequential": "sequential",
    "ddp": "ddp",
    "ddp-tuned": "ddp_tuned",
    "soonest": "soonest",
    "soonest-bfloat16": "soonest_16bit",
}
"""What is compared in the lab, and how it is called in the table."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--simulate", action="store_true", help="by simulation: seconds")
    what.add_argument("--lab", action="store_true", help="on emulated hosts, as root: hours")
    parser.add_argument("--hosts", type=numbers, default=list(GPUS), help="how many (16,64)")
    parser.add_argument("--link", type=parse_rate, help="of the lab: seek none, take this rate")
    parser.add_argument("--slow-motion", type=float, help="of the lab (what cores can do)")
    parser.add_argument("--shrink", type=float, help="of the lab (what cores can do)")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=6, help="of the lab, counted (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of the lab (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    if args.lab and args.link is None and "sequential" not in args.arms:
        parser.error("the rate is sought by what sequential takes: name that arm, or give --link")
    found = simulate(args.hosts) if args.simulate else lab(args)
    show(found["rows"])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def alexnet() -> Trace:
    """One GPU's step with the global batch; its updates are not part of the model."""
    return replace(Trace.load("alexnet"), update_us=0.0)


def whole_s(trace: Trace) -> float:
    return trace.forward_s + trace.backward_s


def conventional_s(gpus: int) -> float:
    """A step of the software before it, in units of one GPU's."""
    return 1 / gpus + 2 * (gpus - 1) * A + 2 * (gpus - 1) / gpus * B


def bound(gpus: int) -> float:
    """The speed-up that bandwidth alone allows."""
    return 1 / max(1 / gpus, 2 * (gpus - 1) / gpus * B)


# By simulation


def simulate(gpus: Sequence[int]) -> dict[str, Any]:
    return {"a": A, "b": B, "rows": [simulated(number) for number in gpus]}


def simulated(gpus: int) -> dict[str, Any]:
    """Speed-ups over one GPU.

    ``soonest_ring`` holds soonest to all-reduces round the ring; ``schedule_bound`` and
    ``ring_bound`` are what no schedule can beat, with all methods and with these.
    """
    whole = alexnet()
    trace = slowed(whole, 1 / (gpus * whole_s(whole)))
    layers = sum(layer.bytes > 0 for layer in trace.layers)
    network = Network.ideal(gpus, 8 * trace.total_bytes / B, A / layers)
    ring = Network({"all_reduce": network.op("all_reduce")})
    return {
        "gpus": gpus,
        "sequential": 1 / baselines.sequential(trace, network, ranks=gpus).step_s,
        "ddp": 1 / baselines.ddp(trace, network, ranks=gpus).step_s,
        "ddp_tuned": 1 / baselines.ddp_tuned(trace, network, ranks=gpus).step_s,
        "soonest_ring": 1 / soonest_s(trace, ring, gpus),
        "soonest": 1 / soonest_s(trace, network, gpus),
        "soonest_16bit": 1 / soonest_s(trace, network.slowed(0.5), gpus),
        "ring_bound": 1 / lower_bound_s(trace, ring),
        "schedule_bound": 1 / lower_bound_s(trace, network),
        "bound": bound(gpus),
        "fujitsu": FUJITSU.get(gpus),
    }


def soonest_s(trace: Trace, network: Network, gpus: int) -> float:
    plan = best_plan(trace, flats_of(trace), network, ranks=gpus)
    return step_time_s(trace, plan, network)


# In the lab


def lab(args: argparse.Namespace) -> dict[str, Any]:
    from soonest.bench.show import Screen
    from soonest.lab import unavailable

    if why := unavailable():
        sys.exit(f"announcement: {why}")
    bench, link_bps, records = Bench(args, Screen()), args.link, []
    for gpus in args.hosts:
        if link_bps is None:
            link_bps, tries = bench.seek(gpus, args.arms)
            records += tries
        else:
            records.append(bench.measure(gpus, link_bps, args.arms))
    rows = list({record["hosts"]: row_of(record) for record in records}.values())
    return {"a": A, "b": B, "link_bps": link_bps, "rows": rows, "records": records}


class Bench:
    """What is measured in the lab.

    Args:
        args: of the command line.
        screen: where to tell how far it has got.
    """

    def __init__(self, args: argparse.Namespace, screen: Screen) -> None:
        self._args = args
        self._screen = screen
        self._scales: dict[int, tuple[float, float]] = {}

    def seek(self, gpus: int, arms: list[str]) -> tuple[float, list[dict[str, Any]]]:
        """The rate at which ``sequential`` gets as far as the model says, and all tries.

        Of what a step takes besides computing a part is latency of this machine's software, so the
        rate is found by a few tries: of ``sequential`` alone first, and then of all arms, as the
        latency may differ from run to run. The last try is the comparison.
        """
        from soonest.lab import PAYLOAD_SHARE

        unit_s = whole_s(alexnet())
        wanted_s = conventional_s(gpus) * unit_s
        link_bps = 8 * alexnet().total_bytes / (B * unit_s) / PAYLOAD_SHARE
        tries: list[dict[str, Any]] = []
        comparing = False
        for _ in range(TRIES):
            record = self.measure(gpus, link_bps, arms if comparing else ["sequential"])
            tries.append(record)
            took_s = record["arms"]["sequential"]["step_ms"] * 1e-3
            self._screen.say(
                f"sequential on {gpus} hosts, links of {rate_text(link_bps)}: "
                f"{unit_s / took_s:.2f}, wanted {unit_s / wanted_s:.2f}"
            )
            off = abs(took_s / wanted_s - 1)
            if comparing and off <= NEAR:
                return link_bps, tries
            if comparing or off > NEAR / 2:  # the other half is for noise in the comparison
                moving_s = record["communication_ms"] * 1e-3
                link_bps *= moving_s / max(moving_s + wanted_s - took_s, moving_s / 3)
            else:
                comparing = True
        sys.exit(
            f"announcement: no rate found at which sequential takes {wanted_s * 1e3:.3f} ms: the "
            "latency of this machine's software is too large a part, give more --slow-motion"
        )

    def measure(self, gpus: int, link_bps: float, arms: list[str]) -> dict[str, Any]:
        """The record of one comparison, in which one GPU's step takes as long as in the trace."""
        from soonest.bench import session
        from soonest.bench.settings import Settings

        trace = slowed(alexnet(), 1 / gpus)
        slow, shrink = self._scale(trace, gpus, link_bps)
        steps, rounds = self._args.steps, self._args.rounds
        settings = Settings(trace, gpus, link_bps, slow, shrink, arms, steps, rounds)
        screen = self._screen
        screen.say(f"{gpus} hosts: slow motion {slow:g}, shrink {shrink:g}, {', '.join(arms)}")
        with screen.work():
            result = session.run(settings, name="alexnet", say=screen.say, watch=screen.watch)
        for warning in result.warnings():
            screen.say(f"WARNING: {warning}")
        return dict(result.record)

    def _scale(self, trace: Trace, gpus: int, link_bps: float) -> tuple[float, float]:
        """Slow motion and shrink: as given, or what the cores can do; the same for every try."""
        from soonest.bench import scale, session

        slow, shrink = self._args.slow_motion, self._args.shrink
        if slow is not None and shrink is not None:
            return slow, shrink
        if gpus not in self._scales:
            self._screen.say(f"Measuring what this machine can carry with {gpus} hosts ...")
            capacity = session.probe(gpus, say=self._screen.say)
            self._scales[gpus] = scale.choose(
                trace, gpus, link_bps, capacity, slow_motion=slow, shrink=shrink
            )
        return self._scales[gpus]


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    """Speed-ups over one GPU, as measured; the bounds are those of the emulated links."""
    gpus, unit_ms = record["hosts"], whole_s(alexnet()) * 1e3
    return {
        "gpus": gpus,
        **{
            name: unit_ms / record["arms"][arm]["step_ms"]
            for arm, name in ARMS.items()
            if arm in record["arms"]
        },
        "schedule_bound": unit_ms / record["bound_ms"],
        "bound": unit_ms / max(record["compute_ms"], record["communication_ms"]),
        "fujitsu": FUJITSU.get(gpus),
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Speed-ups as a table: one column for each number of GPUs."""
    print("Speed-up over one GPU, fixed global batch")
    print("GPUs".ljust(34) + "".join(f"{row['gpus']:>9}" for row in rows))
    for key, what in (
        ("sequential", "sequential"),
        ("ddp", "ddp"),
        ("ddp_tuned", "ddp, best bucket size"),
        ("fujitsu", "Fujitsu, announced in 2016"),
        ("soonest_ring", "soonest, all-reduce only"),
        ("soonest", "soonest"),
        ("ring_bound", "bound of schedules, all-reduce only"),
        ("schedule_bound", "bound of schedules"),
        ("bound", "bound of bandwidth"),
        ("soonest_16bit", "soonest, gradients in 16 bits"),
    ):
        values = [row.get(key) for row in rows]
        if any(values):
            cells = "".join(f"{value:>9.2f}" if value else " " * 9 for value in values)
            print(what.ljust(34) + cells)


if __name__ == "__main__":
    sys.exit(main())
