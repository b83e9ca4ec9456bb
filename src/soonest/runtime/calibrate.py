"""Measures the network."""

from __future__ import annotations

import time

import torch

from soonest.core.network import Network
from soonest.runtime import collectives

# Sizes and repetitions that show latency and bandwidth and take well under a second on 100 Mbit/s.
_LADDER = ((4 << 10, 5), (256 << 10, 3), (1 << 20, 3))


def measure(group: collectives.Group, device: torch.device) -> Network:
    """Times all-reduces of a few sizes on the group at hand; a collective call.

    Returns:
        The first rank's fit, on every rank.
    """
    samples: list[tuple[int, float]] = []
    for size_bytes, times in _LADDER:
        tensor = torch.zeros(size_bytes // 4, device=device)
        collectives.start(
            "all_reduce", group, tensor
        ).wait()  # buffers and connections are made now
        for _ in range(times):
            began = time.perf_counter()
            collectives.start("all_reduce", group, tensor).wait()
            samples.append((size_bytes, time.perf_counter() - began))
    fit = collectives.first_rank_object(group, Network.fit(samples).to_json())
    return Network.from_json(fit)
