"""Runs pairs of ranks that end as scripts do, and says how; a program, for ``test_endings``."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # once for all ranks, which are forked
import torch.distributed as dist
from torch import nn

import soonest
from soonest.core.cost import Network
from soonest.runtime.tuning import calibrate

_LIMIT_S = 60
_LATE_S = 7


def rank(me: int, how: str, folder: Path) -> None:
    """Trains with another one, which comes late, or not at all, to a step."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group(
        "gloo", store=store, rank=me, world_size=2, timeout=timedelta(seconds=_LIMIT_S)
    )
    calibrate.network_of = lambda ranks, **_: Network.linear(1e-3, 1e9)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = soonest.prioritize(model, optimizer, method="allreduce")
    assert handle.engine is not None

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()

    for _ in range(7):
        step()
    handle.flush()
    dist.barrier()
    handle.engine.after_step = lambda _: None
    (folder / f"ready {me}").touch()
    if me == 1:
        if how == "raises":
            raise KeyError("boom")
        time.sleep(_LATE_S if how == "is late" else _LIMIT_S)
    step()
    (folder / f"through {me}").touch()
    if how in ("waits", "raises"):
        step()


def pair(how: str, signals: int = 0) -> dict[str, object]:
    """How the first of two ranks ends; the other does something to it.

    Args:
        how: what happens.
        signals: so often does the first get Ctrl-C, at the end of the script or while it waits.
    """
    folder, pids = Path(tempfile.mkdtemp()), list[int]()
    for me in range(2):
        if (pid := os.fork()) == 0:
            with open(folder / f"said {me}", "w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            rank(me, how, folder)
            sys.exit()
        pids.append(pid)
    first, second = pids
    there = folder / ("through 0" if how == "ends" or how == "waits" else "ready 0")
    deadline = time.monotonic() + _LIMIT_S
    while not there.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    began = time.monotonic()
    for _ in range(signals):
        os.kill(first, signal.SIGINT)
        time.sleep(0.5)
    code = _code(first, deadline)
    took_s = time.monotonic() - began
    if how != "is late":
        os.kill(second, signal.SIGKILL)
    _code(second, deadline)
    left = sorted(path.name for path in folder.glob("core*"))
    said = (folder / "said 0").read_text()
    shutil.rmtree(folder)  # not by a context, which ends in the ranks, too
    return {"code": code, "took_s": took_s, "said": said, "left": left}


def _code(pid: int, deadline: float) -> int | None:
    """None if it does not end."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def all_at_once(cases: dict[str, tuple[str, int]]) -> dict[str, object]:
    """What ``pair`` returns for the arguments of each case; the pairs mostly wait."""
    folder = Path(tempfile.mkdtemp())
    judges: list[int] = []
    for name, given in cases.items():
        if (pid := os.fork()) == 0:
            (folder / name).write_text(json.dumps(pair(*given)))
            os._exit(0)
        judges.append(pid)
    for pid in judges:
        os.waitpid(pid, 0)
    found = {name: json.loads((folder / name).read_text()) for name in cases}
    shutil.rmtree(folder)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # else each rank would copy it all when it ends
    cases = {
        "waits": ("waits", 1),
        "ends": ("ends", 1),
        "ends twice": ("ends", 2),
        "raises": ("raises", 0),
        "is late": ("is late", 0),
    }
    print(json.dumps(all_at_once(cases)))
