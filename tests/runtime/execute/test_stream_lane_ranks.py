"""All of soonest with the lane for devices, over a real process group.

The streams are the host's own order, and gloo lets the host wait: as with gloo on a device.
"""

from __future__ import annotations

from typing import Any

import pytest

from helpers.asked import asked_for
from helpers.host_streams import HostStreams
from helpers.ranks import run_ranks
from parity.cases import CASES, compare
from soonest.runtime.comm import groups
from soonest.runtime.execute.stream_lane import StreamLane
from soonest.runtime.setup import assembly

NAMES = (
    "cnn with BatchNorm", "tied transformer", "branch by rank, AdamW", "several backward passes",
    "accumulation with no_sync", "zero_grad to zero, after the step", "foreign optimizer",
    "clipping, sharded", "branch by rank, momentum, sharded", "several dtypes, sharded",
    "checkpoint, reentrant", "compiled by block", "autocast", "AdamW fused", "GradScaler, fused",
)  # fmt: skip


def on_streams(names: list[str]) -> tuple[dict[str, list[str]], int]:
    """Per case, where it differs from DistributedDataParallel; and how many lanes there were."""
    lanes: list[StreamLane] = []
    ranks_of = groups.ranks_of

    def lane_for(group: Any, device: Any, failures: Any) -> StreamLane:
        lanes.append(StreamLane(HostStreams(), timeout_s=60, failures=failures))
        return lanes[-1]

    assembly.lane_for = lane_for
    groups.ranks_of = lambda group, **_: ranks_of(group, native=True)
    return compare(names), len(lanes)


@pytest.fixture(scope="module")
def compared(request: pytest.FixtureRequest) -> list[tuple[dict[str, list[str]], int]]:
    return run_ranks(on_streams, 2, asked_for(request, "name"))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_bitwise_equal(
    name: str, compared: list[tuple[dict[str, list[str]], int]]
) -> None:
    assert set(NAMES) <= set(CASES)
    assert [differences[name] for differences, _ in compared] == [[], []]
    assert [lanes for _, lanes in compared] == [len(one) for one, _ in compared]
