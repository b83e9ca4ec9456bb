"""Runs a function on several ranks: real processes, one process group."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from soonest.core.cost import Cost, Network
from soonest.core.plan import METHODS
from soonest.core.planner.planner import best_plan
from soonest.runtime.tuning import calibrate, trials

context = multiprocessing.get_context("forkserver")
"""Ranks are forked from one process that has imported all they need, which takes seconds; what
building an optimizer and saving a checkpoint would import, too, and what has started the tests,
which each new process imports as its main module."""
context.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.checkpoint.state_dict", "soonest.runtime", "pytest"]
)

_SEARCH_WORK = 20_000
"""Ops and layers that a rank may simulate when it searches for a plan: it finds one as it always
does, if not the best, and others wait for it."""


def mixed_network(ranks: int) -> Network:
    """Costs that make plans of small models use several methods, the same in every run."""
    slopes = {
        "exchange": 2 * (ranks - 1),
        "all_gather": 3 * (ranks - 1),
        "all_reduce": 0.8,
        "reduce_scatter": 1.2,
        "split": 1.2,
    }
    latencies = {
        "all_reduce": 3e-3,
        "all_gather": 2e-3,
        "ring_reduce_scatter": 2e-3,
        "split": 2e-3,
    }
    kinds = {kind for kinds in METHODS.values() for kind in kinds}
    return Network(
        {
            kind: Cost.linear(latencies.get(kind, 1e-3), 32768e3 / slopes.get(kind, 0.6))
            for kind in sorted(kinds)
        }
    )


def say_done() -> None:
    """Lets a rank that does not take part in something know that this one is through with it."""
    _store().set(f"done {dist.get_rank()}", "")


def wait_for_the_others() -> None:
    """Returns when all other ranks have called ``say_done``."""
    keys = [f"done {rank}" for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    while not _store().check(keys):  # to wait there would keep other threads from the store
        time.sleep(0.05)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


class RankFailedError(AssertionError):
    """A rank raised, died or ran too long."""


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout_s: float = 120,
    collective_timeout_s: float = 60,
    may_die: bool = False,
    calibrated: bool = False,
    first_has_store: bool = False,
) -> list[Any]:
    """Calls ``function(*args)`` on every rank, in a gloo group on loopback.

    Args:
        function: defined at the top of a module.
        ranks: how many processes.
        may_die: a rank that dies without an answer yields None instead of an error.
        calibrated: measure the network, instead of taking ``mixed_network`` for it.
        first_has_store: the key-value store lives and dies with the first rank.

    Returns:
        What each rank returned, by rank.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        port = 0 if first_has_store else store.port
        given = (port, collective_timeout_s, folder, calibrated)
        processes = [
            context.Process(
                target=_rank,
                args=(function, args, rank, ranks, *given),
                daemon=True,
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s
        try:
            return _results(processes, Path(folder), deadline, may_die)
        finally:
            for process in processes:
                process.kill()
                process.join()


def by_turns(
    function: Callable[[Any], dict[Any, Any]], ranks: int, parts: Iterable[Any]
) -> list[dict[Any, Any]]:
    """Calls ``function(part)`` for every part, each on ranks of its own.

    Two groups of ranks train at a time, as each often waits for another; by new processes for
    each part, as they keep the threads and connections of all they have made.

    Returns:
        By rank, what it returned for all parts together.
    """
    found: list[dict[Any, Any]] = [{} for _ in range(ranks)]
    with ThreadPoolExecutor(2) as pool:
        for one in pool.map(lambda part: run_ranks(function, ranks, part, timeout_s=300), parts):
            for rank, differences in zip(found, one, strict=True):
                rank.update(differences)
    return found


def _results(processes: list[Any], folder: Path, deadline: float, may_die: bool) -> list[Any]:
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
            raise RankFailedError(f"ranks {alive} did not end in time")
        failed = list(folder.glob("*.failed"))
        if failed and not may_die:
            raise RankFailedError(f"rank {failed[0].stem} raised:\n{failed[0].read_text()}")
        time.sleep(0.02)
    results: list[Any] = []
    for rank, process in enumerate(processes):
        failed, done = folder / f"{rank}.failed", folder / f"{rank}.done"
        if failed.exists():
            raise RankFailedError(f"rank {rank} raised:\n{failed.read_text()}")
        if not done.exists() and not may_die:
            raise RankFailedError(f"rank {rank} died with exit code {process.exitcode}")
        results.append(pickle.loads(done.read_bytes()) if done.exists() else None)
    return results


def join(rank: int, ranks: int, port: int, timeout_s: float, *, calibrated: bool = False) -> None:
    """Makes this process one of the ranks of a gloo group on loopback.

    Args:
        rank, ranks: which one, of how many.
        port: of the key-value store.
        timeout_s: of the group's collectives.
        calibrated: measure the network, instead of taking ``mixed_network`` for it.
    """
    torch.set_num_threads(1)
    if not calibrated:
        trials.best_plan = functools.partial(best_plan, max_work=_SEARCH_WORK)
        calibrate.network_of = lambda ranks, **_: mixed_network(ranks.group.size())
    os.environ.setdefault("SOONEST_CACHE", "")
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s)
    )


_served: list[dist.TCPStore] = []
"""By this process, as long as it lives."""


def _port_of_first(rank: int, folder: Path) -> int:
    """Where the first rank's key-value store is; that rank starts it."""
    known = folder / "port"
    if rank == 0:
        _served.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        partial = folder / "port.partial"
        partial.write_text(str(_served[0].port))
        partial.rename(known)
    while not known.exists():
        time.sleep(0.02)
    return int(known.read_text())


def _rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    ranks: int,
    port: int,
    collective_timeout_s: float,
    folder: str,
    calibrated: bool,
) -> None:
    gc.freeze()  # what has been imported is not looked through again and again
    port = port or _port_of_first(rank, Path(folder))
    join(rank, ranks, port, collective_timeout_s, calibrated=calibrated)
    try:
        result = function(*args)
        partial = Path(folder, f"{rank}.partial")
        partial.write_bytes(pickle.dumps(result))
        partial.rename(Path(folder, f"{rank}.done"))
    except BaseException:
        Path(folder, f"{rank}.failed").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
