"""What soonest costs where there is nothing to gain: two ranks on plain loopback, and their memory.

Real models compute, nothing is shaped, and sharing is nearly free. Both ways of training run in the
same processes, a few steps each in turn, and all losses must be equal to the last bit. The ratio
differs from one start of the processes to the next, so it is the median of several. Memory is
measured in processes of their own, one way of training each.

    python benchmarks/overhead.py --json benchmarks/records/overhead.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

ARMS = ("ddp", "soonest")
MODELS = ("gpt", "cnn", "mlp")
TURN = 10
MEMORY_STEPS = 10
MEMORY_LAYERS, MEMORY_WIDTH = 8, 2048
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--starts", type=int, default=5, help="of the processes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each way (%(default)s)")
    parser.add_argument("--models", default=",".join(MODELS), help="%(default)s")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        return as_rank(args)
    from soonest.lab import Loopback
    from soonest.lab.messages import listen

    told: list[dict[str, Any]] = []

    def run(*words: str) -> list[dict[str, Any]]:
        told.clear()
        command = [sys.executable, __file__, *words]
        with Loopback(2) as place:
            listen(place, command, lambda _, m: told.append(m), say=print, timeout_s=1200)
        return list(told)

    record: dict[str, Any] = {"models": {}, "memory": {}}
    for model in args.models.split(","):
        print(f"{model}: training", flush=True)
        starts = [
            run("--as-rank", model, "--rounds", str(args.rounds))[0] for _ in range(args.starts)
        ]
        ratios = [start["ratio"] for start in starts]
        for start in starts:
            del start["kind"]
        ratio = statistics.median(ratios)
        record["models"][model] = {"ratio": ratio, "starts": starts}
        print(
            f"{model}: {starts[0]['parameters'] / 1e6:.2f} million parameters, ddp "
            f"{statistics.median(start['ddp_ms'] for start in starts):.2f} ms, soonest "
            f"{statistics.median(start['soonest_ms'] for start in starts):.2f} ms: {ratio:.3f} "
            f"times as long ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )
    for arm in () if args.no_memory else ARMS:
        found = run("--as-rank", f"memory-{arm}")
        record["memory"][arm] = {
            key: statistics.mean(one[key] for one in found) for key in ("steady_mb", "peak_mb")
        }
        told_mb = ", ".join(f"{k} {v:.1f}" for k, v in record["memory"][arm].items())
        print(f"memory of a rank with {arm}: {told_mb}", flush=True)
    if record["memory"]:
        for key in ("steady_mb", "peak_mb"):
            ddp, ours = (record["memory"][arm][key] for arm in ARMS)
            print(f"{key}: {ours / ddp:.4f} times DDP's")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


# The ranks


def as_rank(args: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    what: str = args.as_rank
    if what.startswith("memory-"):
        memory(what.removeprefix("memory-"))
    else:
        compare(what, args.rounds)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def gpt() -> tuple[Any, Callable[[], Any]]:
    import torch

    from soonest.demo.model import CONTEXT, Gpt

    model = Gpt()
    text = torch.randint(0, 256, (2, CONTEXT + 1))
    return model, lambda: model(text[:, :-1], text[:, 1:])


def cnn() -> tuple[Any, Callable[[], Any]]:
    import torch
    from torch import nn

    widths = (3, 32, 64, 64, 128, 128)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=1 + (after > before), padding=1)]
        layers += [nn.GroupNorm(8, after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    return model, lambda: nn.functional.cross_entropy(model(images), labels)


def mlp() -> tuple[Any, Callable[[], Any]]:
    import torch
    from torch import nn

    layers = [layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    inputs, labels = torch.randn(256, 256), torch.randint(0, 10, (256,))
    return model, lambda: nn.functional.cross_entropy(model(inputs), labels)


def make(name: str, arm: str) -> tuple[Callable[[], float], Any]:
    """One step of training as a function, and soonest's handle if that is what trains."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    import soonest

    torch.manual_seed(0)
    model, loss_of = {"gpt": gpt, "cnn": cnn, "mlp": mlp}[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = None
    if arm == "ddp":
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # The closure calls the model by its name: let that lead through DDP.
        cells = dict(zip(loss_of.__code__.co_freevars, loss_of.__closure__ or (), strict=True))
        cells["model"].cell_contents = wrapped
    else:
        handle = soonest.prioritize(model, optimizer)

    def step() -> float:
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, handle


def compare(name: str, rounds: int) -> None:
    import torch.distributed as dist

    from soonest.lab.messages import tell

    (ddp, _), (ours, handle) = (make(name, arm) for arm in ARMS)
    steps = {"ddp": ddp, "soonest": ours}
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    while not handle.settled:
        losses["soonest"].append(ours())
    handle.flush()
    losses["ddp"] += [ddp() for _ in losses["soonest"]]
    turns_ms: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in ARMS if number % 2 else ARMS[::-1]:
            dist.barrier()
            began = time.perf_counter()
            losses[arm] += [steps[arm]() for _ in range(TURN)]
            handle.flush()
            turns_ms[arm].append((time.perf_counter() - began) / TURN * 1e3)
    assert losses["ddp"] == losses["soonest"], "the losses differ, which they must not"
    assert all(math.isfinite(loss) for loss in losses["ddp"])
    ddp_ms, soonest_ms = (statistics.median(turns_ms[arm]) for arm in ARMS)
    ratios = [b / a for a, b in zip(turns_ms["ddp"], turns_ms["soonest"], strict=True)]
    if dist.get_rank() == 0:
        import torch

        torch.manual_seed(0)
        model, _ = {"gpt": gpt, "cnn": cnn, "mlp": mlp}[name]()
        tell(
            "compared",
            parameters=sum(p.numel() for p in model.parameters()),
            ddp_ms=ddp_ms,
            soonest_ms=soonest_ms,
            buckets=len(handle.plan.buckets),
            ratio=statistics.median(ratios),
            turns_ms=turns_ms,
        )


def memory(arm: str) -> None:
    """Tells a process's memory while it trains, beyond what it needs before there is a model."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    import soonest
    from soonest.lab.messages import tell

    dist.barrier()
    model: nn.Module = nn.Sequential(
        *(nn.Linear(MEMORY_WIDTH, MEMORY_WIDTH) for _ in range(MEMORY_LAYERS))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    if arm == "ddp":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        soonest.prioritize(model, optimizer)
    x = torch.randn(8, MEMORY_WIDTH)
    steady: list[float] = []
    for _ in range(MEMORY_STEPS):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steady.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES / 1e6)
    status = Path("/proc/self/status").read_text()
    peak_kb = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    tell("memory", steady_mb=statistics.median(steady[2:]), peak_mb=int(peak_kb) * 1024 / 1e6)


if __name__ == "__main__":
    sys.exit(main())
