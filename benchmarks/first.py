"""soonest against DistributedDataParallel where sharing gradients takes as long as computing them.

A trace's compute is replayed in slow motion on emulated hosts, with real parameters, gradients and
TCP over links of a chosen rate. All arms run in the same processes, in alternation. In the end the
parameters of all ranks must be right to the last bit, or no figures are given.

    sudo python benchmarks/first.py --json benchmarks/records/first.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

MOMENTUM = 0.875
WARM_UP = 7
"""Steps of each arm that do not count; soonest is done with planning after its fifth."""
DDP_CAPS_MB = {"ddp-default": (1, 25)} | {f"ddp-{mb}mb": (mb,) for mb in (1, 5, 50, 100, 400)}
"""DDP's bucket sizes before shrinking; by default its first bucket is smaller than the others."""
ARMS = ("local", *DDP_CAPS_MB, "soonest")
MOST_LATE = 0.02


def main() -> int:
    from soonest.core.network import parse_rate

    parser = argparse.ArgumentParser(
        description="Compares soonest with DDP on emulated hosts.", allow_abbrev=False
    )
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--link", default="318mbit", help="rate of the emulated links, as shaped")
    parser.add_argument("--trace", default="alexnet", help="name or file")
    parser.add_argument("--slow-motion", type=float, default=40.0)
    parser.add_argument("--shrink", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=8, help="counted, per arm and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(ARMS), help="%(default)s")
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--rank-worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_worker:
        return work(args)
    try:
        args.link_bps = parse_rate(args.link)
        return compare(args)
    except ValueError as error:
        print(f"first.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


# The parent: makes the hosts and reports


def compare(args: argparse.Namespace) -> int:
    from soonest.core.timeline import Timeline
    from soonest.core.trace import Trace
    from soonest.lab import Lab, unavailable
    from soonest.report.picture import draw

    trace = Trace.load(args.trace)
    if args.hosts < 2:
        raise ValueError(f"{args.hosts} hosts share nothing: give two or more")
    if unknown := set(args.arms.split(",")) - set(ARMS):
        raise ValueError(f"no arm {unknown.pop()!r}: there are {', '.join(ARMS)}")
    if reason := unavailable():
        raise ValueError(reason)
    with tempfile.TemporaryDirectory() as folder, Lab(args.hosts, args.link_bps) as lab:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--rank-worker", str(result)]
        print(f"{args.hosts} hosts, links of {args.link_bps / 1e6:g} Mbit/s", flush=True)
        if lab.run(command):
            print("first.py: a rank failed, so there are no figures", file=sys.stderr)
            return 1
        measured = json.loads(result.read_text())
    record = {**settings_of(args), **expectations(trace, args), **measured}
    print()
    print(table(record))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        picture = draw(
            [Timeline.from_json(timeline) for timeline in record["timelines"].values()],
            args.json.with_suffix(".png"),
            title=f"One step of {args.trace} on {args.hosts} hosts",
        )
        print(f"\nThe record is in {args.json}, its picture in {picture}")
    return 0


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {
        "trace": args.trace,
        "hosts": args.hosts,
        "link_bps": args.link_bps * args.slow_motion * args.shrink,
        "shaped_link_bps": args.link_bps,
        "slow_motion": args.slow_motion,
        "shrink": args.shrink,
        "momentum": MOMENTUM,
        "warm_up_steps": WARM_UP,
        "steps": args.steps,
        "rounds": args.rounds,
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def expectations(trace: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What the step takes on paper, in the trace's own milliseconds, at the links' payload rate."""
    from soonest.core.bounds import lower_bound_s
    from soonest.core.network import Network
    from soonest.core.planner import flats_of, make_plan
    from soonest.core.simulate import step_time_s
    from soonest.lab import PAYLOAD_SHARE

    link_bps = args.link_bps * PAYLOAD_SHARE * args.slow_motion * args.shrink
    network = Network.ideal(ranks=args.hosts, link_bps=link_bps)
    plan = make_plan(trace, flats_of(trace), network, ranks=args.hosts)
    return {
        "compute_ms": (trace.forward_s + trace.backward_s) * 1e3,
        "communication_ms": network.cost_s("allreduce", trace.total_bytes) * 1e3,
        "bound_ms": lower_bound_s(trace, network) * 1e3,
        "predicted_soonest_ms": step_time_s(trace, plan, network) * 1e3,
    }


def best_ddp(step_ms: dict[str, float]) -> str | None:
    """The fastest of DDP's bucket sizes."""
    ddp = [name for name in step_ms if name.startswith("ddp")]
    return min(ddp, key=step_ms.__getitem__, default=None)


def table(record: dict[str, Any]) -> str:
    bound_ms = record["bound_ms"]
    step_ms = {name: arm["step_ms"] for name, arm in record["arms"].items()}
    best = best_ddp(step_ms)
    width = max(len(name) for name in step_ms)
    lines = [f"{'arm':{width}}  step ms  speed, best ddp = 1  time, bound = 1"]
    for name, ms in step_ms.items():
        speed = f"{step_ms[best] / ms:.3f}" if best else "-"
        note = "  (best ddp)" if name == best else ""
        lines.append(f"{name:{width}}  {ms:7.2f}  {speed:>19}  {ms / bound_ms:15.3f}{note}")
    lines += [
        "",
        f"In the trace's own time: computation {record['compute_ms']:.2f} ms, "
        f"communication {record['communication_ms']:.2f} ms,",
        f"bound {bound_ms:.2f} ms, soonest as predicted {record['predicted_soonest_ms']:.2f} ms. "
        f"Here all took {record['slow_motion']:g} times as long.",
    ]
    return "\n".join(lines)


# The ranks


@dataclass
class Arm:
    """One way of training.

    Args:
        replay: what is trained.
        model: what the loop calls; the replay or something around it.
        optimizer: what the loop steps.
        flush: waits until nothing is in flight.
        timeline: of the last step, if the arm measures it.
        observe: makes the arm measure it.
        detach: undoes it.
    """

    replay: Any
    model: Callable[[Any], Any]
    optimizer: Any
    flush: Callable[[], None] = lambda: None
    timeline: Callable[[], Any] = lambda: None
    observe: Callable[[], None] = lambda: None
    detach: Callable[[], None] = lambda: None

    def steps(self, number: int) -> list[float]:
        """Trains, and returns when each backward pass began."""
        import torch

        began: list[float] = []
        x = torch.zeros(1)
        for _ in range(number):
            loss = self.model(x)
            self.optimizer.zero_grad()
            began.append(time.perf_counter())
            loss.backward()
            self.optimizer.step()
        self.flush()
        return began


def arms(args: argparse.Namespace) -> dict[str, Callable[[], Arm]]:
    """How to make each arm, by name."""
    from torch.nn.parallel import DistributedDataParallel

    import soonest
    from soonest.bench.observe import DdpObserver
    from soonest.core.trace import Trace
    from soonest.lab.replay import Replay

    trace = Trace.load(args.trace)

    def replay(alone: bool = False) -> Any:
        return Replay(
            trace, args.slow_motion, args.shrink, momentum=MOMENTUM, alone=alone, check=True
        )

    def local() -> Arm:
        model = replay(alone=True)
        return Arm(model, model, model.sgd())

    def ddp(*caps_mb: float) -> Arm:
        model = replay()
        optimizer = model.sgd()
        caps: Any = [cap / args.shrink for cap in caps_mb]
        wrapped = DistributedDataParallel(
            model, bucket_cap_mb_list=caps, gradient_as_bucket_view=True
        )
        arm = Arm(model, wrapped, optimizer)

        def observe() -> None:  # from then on it is no longer plain DDP
            arm.timeline = DdpObserver(wrapped, optimizer).timeline

        arm.observe = observe
        return arm

    def prioritized() -> Arm:
        model = replay()
        optimizer = model.sgd()
        handle = soonest.prioritize(model, optimizer)
        return Arm(model, model, optimizer, handle.flush, handle.timeline, handle.detach)

    every: dict[str, Callable[[], Arm]] = {"local": local, "soonest": prioritized}
    every |= {name: lambda caps=caps: ddp(*caps) for name, caps in DDP_CAPS_MB.items()}
    return {name: every[name] for name in args.arms.split(",")}


def work(args: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    made: dict[str, Arm] = {}
    for name, make in arms(args).items():
        say(f"{name}: warming up")
        made[name] = make()
        dist.barrier()
        made[name].steps(WARM_UP)
    step_ms: dict[str, list[float]] = {name: [] for name in made}
    seen: dict[str, list[Any]] = {name: [] for name in made}
    for number in range(args.rounds):
        for name, arm in made.items():
            dist.barrier()
            began = arm.steps(args.steps + 1)
            steps = [(b - a) * 1e3 / args.slow_motion for a, b in pairwise(began)]
            means = [statistics.mean(every) for every in zip(*gather(steps), strict=True)]
            step_ms[name] += means
            say(f"round {number + 1}, {name}: {statistics.median(means):.2f} ms a step")
            seen[name].append(arm.timeline())
    median_ms = {name: statistics.median(ms) for name, ms in step_ms.items()}
    if best := best_ddp(median_ms):
        made[best].observe()
        for _ in range(args.rounds):
            made[best].steps(3)
            seen[best].append(made[best].timeline())
    timelines = {
        name: typical(steps, args.slow_motion * median_ms[name] / 1e3)
        .scaled(1 / args.slow_motion, title=name)
        .to_json()
        for name in (best, "soonest")
        if name and (steps := [step for step in seen.get(name, ()) if step])
    }
    failures = [failure for name, arm in made.items() if (failure := fault(name, arm))]
    for arm in made.values():
        arm.detach()
    wrong = any(gather(failures))
    if wrong:
        print(*failures, sep="\n", flush=True)
    elif dist.get_rank() == 0:
        say("the parameters of all arms are right on all ranks")
        figures = {
            name: {"step_ms": median_ms[name], "step_ms_all": ms} for name, ms in step_ms.items()
        }
        args.rank_worker.write_text(json.dumps({"arms": figures, "timelines": timelines}))
    dist.barrier()
    dist.destroy_process_group()
    return 1 if wrong else 0


def typical(timelines: list[Any], step_s: float) -> Any:
    """The one whose step is nearest to ``step_s``."""
    return min(timelines, key=lambda timeline: abs(timeline.step_s - step_s))


def fault(name: str, arm: Arm) -> str | None:
    """Why the figures of an arm are not to be trusted."""
    if wrong := arm.replay.verify():
        return f"{name}: {wrong}"
    late = arm.replay.pace.late_s / (arm.replay.slow_motion * arm.replay.trace.forward_s)
    if late > MOST_LATE:
        return f"{name}: this machine is too slow for the replay, give more --slow-motion"
    return None


def gather(value: Any) -> list[Any]:
    import torch.distributed as dist

    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def say(text: str) -> None:
    if os.environ["RANK"] == "0":
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
