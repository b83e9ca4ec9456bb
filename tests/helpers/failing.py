"""What tests of failures share: one odd rank, and what the others then raise."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import soonest
from helpers.ranks import run_ranks, say_done, wait_for_the_others
from soonest.runtime.handle import Handle

ODD = 1
"""The rank that does otherwise than the others."""
SHORT_S = 4.0


class Said(NamedTuple):
    """The error that a call raised: its name, its message, and after how long."""

    name: str
    message: str
    took_s: float


def model_and_optimizer(width: int = 64) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def odd() -> bool:
    return dist.get_rank() == ODD


def backward(model: nn.Module) -> None:
    model(torch.randn(4, 8)).square().sum().backward()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def in_training(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Handle]:
    """Prioritized, trained for a few steps, with nothing in flight, on all ranks at once."""
    model, optimizer = model_and_optimizer()
    handle = soonest.prioritize(model, optimizer, **options)
    steps(model, optimizer, 7)
    handle.flush()
    dist.barrier()
    return model, optimizer, handle


def error_of(function: Any, *args: Any, **options: Any) -> Said:
    began = time.monotonic()
    try:
        function(*args, **options)
    except Exception as error:
        return Said(type(error).__name__, str(error), time.monotonic() - began)
    return Said("", "", time.monotonic() - began)


def end(how: str) -> None:
    """What may happen to a process."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stops":
        dist.distributed_c10d._get_default_store().set("stopped", str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "leaves":
        os._exit(0)
    else:
        wait_for_the_others()


def end_what_stopped() -> None:
    store = dist.distributed_c10d._get_default_store()
    if store.check(["stopped"]):
        os.kill(int(store.get("stopped")), signal.SIGKILL)


def told(*found: Said) -> tuple[Said, ...]:
    """To be called by those that are left."""
    say_done()
    if dist.get_rank() == 0:
        end_what_stopped()
    return found


def meets_again(found: Said) -> tuple[Said, ...]:
    """The rank at fault lives on; that its process ends is not what tells the others."""
    say_done()
    wait_for_the_others()
    return (found,)


class Run(NamedTuple):
    """What is to be run: on how many ranks, with which arguments and time-out of their group."""

    function: Callable[..., Any]
    ranks: int
    args: tuple[Any, ...] = ()
    timeout_s: float = 60.0
    first_has_store: bool = False


Runs = dict[str, Future[list[Any]]]
TIMEOUT_S = 60.0


def started(runs: Mapping[str, Run]) -> Iterator[Runs]:
    """Several at once, as they mostly wait."""
    pool = ThreadPoolExecutor(4)
    yield {
        name: pool.submit(
            run_ranks,
            run.function,
            run.ranks,
            *run.args,
            may_die=True,
            collective_timeout_s=run.timeout_s,
            first_has_store=run.first_has_store,
        )
        for name, run in runs.items()
    }
    pool.shutdown(cancel_futures=True)


def left(results: list[Any]) -> list[Said]:
    """What was raised on the ranks that are left; nothing came of the odd one."""
    assert results[ODD] is None
    found = [said for rank, said in enumerate(results) if rank != ODD]
    assert all(len(said) == 1 for said in found)
    return [said[0] for said in found]
