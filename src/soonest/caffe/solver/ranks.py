"""Which of several processes this is, as torchrun and the lab say it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Joins the other ranks, if there are any.

    Yields:
        The rank of this process, and how many there are.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield 0, 1
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), ranks
    finally:
        dist.destroy_process_group()
