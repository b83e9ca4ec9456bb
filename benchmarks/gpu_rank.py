"""What one rank of ``gpu_check.py`` does: each function checks one thing and tells the result."""

from __future__ import annotations

import copy
import gc
import json
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gpu_parity
import soonest
from gpu_models import WORKS, Work
from gpu_trace import overlap_of
from soonest.core.cost import Cost, Network
from soonest.core.plan import METHODS
from soonest.core.planner.planner import first_plan
from soonest.core.trace import Trace
from soonest.errors import SoonestError
from soonest.lab.messages import tell
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.device.streams import DeviceStreams
from soonest.runtime.engine.backward import Backward
from soonest.runtime.engine.engine import Engine
from soonest.runtime.engine.in_flight import InFlight
from soonest.runtime.execute.stream_lane import StreamLane
from soonest.runtime.flat.buffers import flats_for, trainable
from soonest.runtime.handle import Handle
from soonest.runtime.options import Options
from soonest.runtime.setup import TrainingPart, build

_T = TypeVar("_T")
GOAL = 1.01
_ROUNDS = 6
_TURN_S = 1.0
_LIKELY = Cost.linear(2e-5, 2e10)
"""About what lets a plan have as many buckets as it would have between machines."""


def run(what: str, backend: str, folder: str, *words: str) -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    dist.init_process_group(backend)
    try:
        PARTS[what](device, Path(folder), *words)
        torch.cuda.synchronize()
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # what is stuck on the device would hold up a usual end
    dist.destroy_process_group()


def say(ok: bool | None, found: str, **figures: Any) -> None:
    if dist.get_rank() == 0 or ok is False:
        tell("found", ok=ok, found=found, figures=figures)


def alone(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    method: str = "allreduce",
) -> Handle:
    """All of soonest on one rank, where it would otherwise do nothing."""
    flats = flats_for(trainable(model))
    network = Network(dict.fromkeys(("all_reduce", *METHODS[method]), _LIKELY))
    plan = first_plan(flats, network, ranks=1, window=2, methods=(method,))
    assert dist.group.WORLD is not None
    lane = StreamLane(
        DeviceStreams(device), timeout_s=60, failures=FailureReporter(dist.group.WORLD)
    )
    return build(model, optimizer, Options(plan=plan), TrainingPart(lane=lane))


def prioritized(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    method: str | None = None,
    shard_optimizer: bool = False,
) -> Handle:
    if dist.get_world_size() > 1:
        return soonest.prioritize(model, optimizer, method=method, shard_optimizer=shard_optimizer)
    if method is None or shard_optimizer:  # there is nobody to share with
        return alone(model, optimizer, device)
    return alone(model, optimizer, device, method=method)


# Results


def parity(device: torch.device, folder: Path) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    exact = dist.get_world_size() <= 2
    different: dict[str, str] = {}
    for name, case in gpu_parity.CASES.items():
        print(name, flush=True)  # so that it is known where a rank has come to a stop
        try:
            theirs = gpu_parity.train(case, device, None)
            mine = gpu_parity.train(case, device, prioritized)
        except Exception as error:
            different[name] = f"{type(error).__name__}: {error}"
            if dist.get_world_size() > 1:  # the others may be anywhere now
                say(False, f"{name}: {different[name]}", different=different)
                raise
            continue
        if (what := gpu_parity.difference(mine, theirs, exact=exact)) is not None:
            different[name] = what
    cases = len(gpu_parity.CASES)
    if different:
        say(False, "; ".join(f"{k}: {v}" for k, v in different.items()), different=different)
    else:
        say(True, f"{cases} ways of training, {'bit by bit' if exact else 'within rounding'}")


# What the host does


def _mlp(device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    layers: list[nn.Module] = [nn.Linear(512, 512), nn.BatchNorm1d(512)]  # with buffers to send
    layers += [layer for _ in range(5) for layer in (nn.Linear(512, 512), nn.ReLU())]
    x = torch.randn(64, 512, device=device)
    return nn.Sequential(*layers).to(device), lambda model: model(x).square().mean()


def _stepper(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[nn.Module], Tensor],
    *,
    scaled: bool = False,
) -> Callable[[], None]:
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16 if scaled else torch.bfloat16):
            loss = loss_of(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def quiet(device: torch.device, folder: Path) -> None:
    """Any operation that lets the host wait for the device is an error here."""
    ways: tuple[tuple[Callable[..., torch.optim.Optimizer], bool], ...] = (
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), False),
        (lambda p: torch.optim.AdamW(p, lr=1e-3), False),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), False),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), True),
    )
    for make, scaled in ways:
        model, loss_of = _mlp(device)
        optimizer = make(model.parameters())
        handle = alone(model, optimizer, device)
        step = _stepper(model, optimizer, loss_of, scaled=scaled)
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        handle.detach()
    say(True, f"10 steps each in {len(ways)} ways of training, waiting being an error")


def graphs(device: torch.device, folder: Path) -> None:
    """Capturing a graph of a forward pass is refused, and training goes on."""
    model, loss_of = _mlp(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = alone(model, optimizer, device)
    step = _stepper(model, optimizer, loss_of)
    step()
    refused: list[str] = []
    for _ in range(2):  # with updates in flight, and without
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                loss_of(model)
        except SoonestError as error:
            refused.append(str(error))
        handle.flush()
    step()
    handle.detach()
    say(len(refused) == 2, refused[0] if len(refused) == 2 else "a forward pass was captured")


def races(device: torch.device, folder: Path) -> None:
    from torch.cuda import _sanitizer

    _sanitizer.enable_cuda_sanitizer()
    model, loss_of = _mlp(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    handle = alone(model, optimizer, device)
    step = _stepper(model, optimizer, loss_of)
    for _ in range(8):
        step()
    handle.detach()
    torch.cuda.synchronize()
    say(True, "8 steps, every access to memory watched")


_TIMED = (
    (Engine, ("step", "forward_begins", "forward_ends")),
    (Backward, ("_before", "_after", "_closed")),
    (InFlight, ("wait_param",)),
)


def host(device: torch.device, folder: Path) -> None:
    """How long the host is busy with soonest in a step; the updates are in ``step``."""
    spent_s: dict[str, float] = {}
    inside = threading.local()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(inside, "busy", False):
                return function(*args, **kwargs)
            inside.busy, began_s = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside.busy = False
                spent_s[name] = spent_s.get(name, 0.0) + time.perf_counter() - began_s

        return call

    for cls, names in _TIMED:
        for name in names:
            setattr(cls, name, timed(f"{cls.__name__}.{name}", getattr(cls, name)))
    words: list[str] = []
    figures: dict[str, Any] = {}
    for name in ("resnet50", "gpt2-small"):
        work = WORKS[name]
        model = work.make().to(device)
        loss_of = work.loss_of(1, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        plain_s = _host_time_of_plain_step(model, optimizer, loss_of)
        handle = alone(model, optimizer, device)
        step = _stepper(model, optimizer, loss_of)
        for _ in range(5):
            step()
        spent_s.clear()
        for _ in range(10):
            torch.cuda.synchronize()  # so that the host never waits for room in a queue
            step()
        per_step_ms = {key: value / 10 * 1e3 for key, value in spent_s.items()}
        handle.detach()
        more_ms = sum(per_step_ms.values()) - plain_s * 1e3
        words.append(f"{name} {more_ms:.2f} ms more than optimizer.step() takes alone")
        figures[name] = {"ms": per_step_ms, "plain_step_ms": plain_s * 1e3}
    say(None, ", ".join(words), **figures)


def _host_time_of_plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[nn.Module], Tensor]
) -> float:
    took: list[float] = []
    for _ in range(8):
        loss_of(model).backward()
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        optimizer.step()
        took.append(time.perf_counter() - began_s)
        optimizer.zero_grad()
    return statistics.median(took[3:])


# Times


def overhead(device: torch.device, folder: Path, name: str) -> None:
    """Three ways of training take turns in one process."""
    torch.backends.cudnn.benchmark = True
    work = WORKS[name]
    batch, step_ms = _if_it_fits(work.batch, lambda batch: _turns(work, batch, device))
    plain, ddp = (
        statistics.median(a / b for a, b in zip(step_ms["soonest"], step_ms[arm], strict=True))
        for arm in ("plain", "ddp")
    )
    median = {arm: statistics.median(values) for arm, values in step_ms.items()}
    say(
        max(plain, ddp) <= GOAL,
        f"batch {batch}: {median['soonest']:.2f} ms, {plain:.3f} × plain, {ddp:.3f} × DDP "
        f"(goal {GOAL})",
        batch=batch,
        step_ms=step_ms,
    )


def _if_it_fits(batch: int, run: Callable[[int], _T]) -> tuple[int, _T]:
    """Runs something with a batch of this size, or half of it, and so on; which one, and what."""
    while True:
        try:
            return batch, run(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        gc.collect()  # models and engines refer to each other
        torch.cuda.empty_cache()


def _turns(work: Work, batch: int, device: torch.device) -> dict[str, list[float]]:
    first = work.make()
    loss_of = work.loss_of(batch, device)
    steps: dict[str, Callable[[], None]] = {}
    handle: Handle | None = None
    for arm in ("plain", "ddp", "soonest"):
        model: nn.Module = copy.deepcopy(first).to(device)
        if not work.vocabulary:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if arm == "ddp":
            model = DistributedDataParallel(
                model, device_ids=[device.index], gradient_as_bucket_view=True
            )
        if arm == "soonest":
            handle = alone(model, optimizer, device)
        steps[arm] = _stepper(model, optimizer, loss_of)
    assert handle is not None

    def turn(arm: str, count: int) -> float:
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        for _ in range(count):
            steps[arm]()
        handle.flush()
        torch.cuda.synchronize()
        return (time.perf_counter() - began_s) / count * 1e3

    for arm in steps:
        turn(arm, 5)
    count = max(3, int(_TURN_S * 1e3 / turn("plain", 3)))
    found: dict[str, list[float]] = {arm: [] for arm in steps}
    for number in range(_ROUNDS):
        for arm in list(steps)[:: 1 if number % 2 else -1]:
            found[arm].append(turn(arm, count))
    handle.detach()
    return found


def overlap(device: torch.device, folder: Path) -> None:
    """A profiler's trace of some steps, and how much of what runs beside computing overlaps it."""
    work = WORKS["gpt2-small"]
    model = work.make().to(device)
    loss_of = work.loss_of(2, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    handle = prioritized(model, optimizer, device)
    step = _stepper(model, optimizer, loss_of)
    steps = 0
    while steps < 12 or (steps < 100 and not handle.settled):
        step()
        steps += 1
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(4):
            step()
        handle.flush()
        torch.cuda.synchronize()
    if dist.get_rank() == 0:
        file = folder / "gpu-profile.json"
        profiler.export_chrome_trace(str(file))
        found = overlap_of(json.loads(file.read_text())["traceEvents"])
        beside_ms, overlapped_ms = found["beside_us"] / 1e3, found["overlapped_us"] / 1e3
        say(
            overlapped_ms > 0 and found["streams"] > 1,
            f"{overlapped_ms:.2f} of {beside_ms:.2f} ms beside computing overlap it, "
            f"on {found['streams']} streams in {found['waits']} host waits",
            **found,
        )
    handle.detach()


def traces(device: torch.device, folder: Path) -> None:
    """Per-layer times of well-known models, as ``soonest predict --trace FILE`` reads them."""
    recorded: dict[str, Any] = {}
    for name, work in WORKS.items():
        batch, found = _if_it_fits(work.batch, lambda batch, work=work: _trace(work, batch, device))
        info = {
            "device": torch.cuda.get_device_name(device),
            "batch": batch,
            "dtype": "bfloat16 (autocast)",
            "source": "benchmarks/gpu_check.py",
        }
        trace = Trace(name, found.layers, found.update_us, info)
        recorded[name] = trace.to_json()
        (folder / f"{name}.json").write_text(json.dumps(recorded[name], indent=1) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    told = ", ".join(
        f"{name} {sum(la['fwd_us'] + la['bwd_us'] for la in data['layers']) / 1e3:.1f} ms"
        for name, data in recorded.items()
    )
    say(None, told, traces=recorded)


def _trace(work: Work, batch: int, device: torch.device) -> Trace:
    model = work.make().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    loss_of = work.loss_of(batch, device)
    handle = alone(model, optimizer, device)
    step = _stepper(model, optimizer, loss_of)
    for _ in range(5):
        step()
    assert handle.engine is not None
    handle.engine.profiler.attention.learning = True
    for _ in range(12):
        step()
    found = handle.engine.profiler.trace()
    assert found is not None
    handle.detach()
    return found


PARTS: dict[str, Callable[..., None]] = {
    part.__name__: part for part in (parity, quiet, races, graphs, host, overhead, overlap, traces)
}
