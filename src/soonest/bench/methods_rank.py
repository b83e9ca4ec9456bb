"""One rank that measures methods of reducing: ``python -m soonest.bench.methods_rank``."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from soonest.bench.load import Load
from soonest.bench.methods import ITEM_BYTES, SIZES, kept, repetitions
from soonest.lab.messages import tell
from soonest.runtime import comm
from soonest.runtime.comm import Ranks, groups

_WARM_UPS = 2
"""In which connections and buffers are made."""
_PERIOD = 251
"""Odd and prime: a part put in a wrong place shows, as parts start at even numbers."""
_TIMEOUT = timedelta(seconds=300)


@dataclass(frozen=True)
class Found:
    """What reducing tensors of one size came to, the same on every rank.

    Args:
        times_s: by method, seconds of each repetition on the slowest rank.
        faults: which sums were wrong, in words.
    """

    times_s: dict[str, list[float]]
    faults: list[str]


def measure(
    ranks: Ranks,
    methods: Sequence[str],
    size_bytes: int,
    *,
    times: int,
    on_repeated: Callable[[], None] = lambda: None,
) -> Found:
    """Reduces tensors by all methods in turn and looks at every sum; a collective call.

    Args:
        ranks: over which.
        methods: each is measured once per repetition, so that what disturbs one disturbs all.
        size_bytes: of the tensor.
        times: repetitions.
        on_repeated: called after each.
    """
    rank, n = ranks.group.rank(), ranks.group.size()
    mine = addend(rank, size_bytes // ITEM_BYTES)
    whole = torch.stack([addend(other, mine.numel()) for other in range(n)]).sum(0)
    tensor = torch.empty_like(mine)
    took: dict[str, list[float]] = {method: [] for method in methods}
    faults: list[str] = []
    for _ in range(times):
        for method in methods:
            tensor.copy_(mine)
            dist.barrier()
            began_s = time.perf_counter()
            comm.reduce(method, ranks, tensor)
            took[method].append(time.perf_counter() - began_s)
            if not torch.equal(tensor, whole):
                faults.append(f"{size_bytes} bytes reduced by {method} (on rank {rank})")
        on_repeated()
    every = comm.gather_objects(ranks.group, (took, faults))
    slowest_s = {
        method: [max(at) for at in zip(*(took[method] for took, _ in every), strict=True)]
        for method in methods
    }
    return Found(slowest_s, [fault for _, faults in every for fault in faults])


def addend(rank: int, count: int) -> Tensor:
    """What a rank brings: small whole numbers, so that sums are exact in whatever order."""
    return ((torch.arange(count) * (rank + 3) + rank) % _PERIOD).float()


def run(ranks: Ranks) -> None:
    """Measures all sizes, until a sum is wrong; the first rank tells."""
    first = tell if ranks.group.rank() == 0 else _tell_nobody
    methods = list(ranks.methods)
    faults = measure(ranks, methods, SIZES[0], times=_WARM_UPS).faults
    first("warm")
    for size in SIZES:
        told = partial(first, "repeated", size_bytes=size)
        with Load() as load:
            found = measure(ranks, methods, size, times=repetitions(size), on_repeated=told)
        faults += found.faults
        if faults:
            first("wrong", fault=faults[0])
            return
        first("measured", size_bytes=size, times_s=found.times_s, load=load.share)
        cost_s = {method: median(times) for method, times in found.times_s.items()}
        methods = kept(methods, size, cost_s)


def _tell_nobody(kind: str, **content: object) -> None:
    pass


def main() -> None:
    """What each rank runs."""
    # Ctrl-C reaches every process of a terminal; the one that started the ranks ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    run(groups.ranks_of(groups.private_group(None, None)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
