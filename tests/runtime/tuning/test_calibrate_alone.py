"""What a calibration makes of times that are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.fake_ranks import FakeGroup, Meeting, ranks_for
from soonest.core.cost import Network
from soonest.runtime.comm import EXACT
from soonest.runtime.tuning import calibrate
from soonest.runtime.tuning.op_times import Stream


def test_what_passes_while_others_transfer_is_seen_from_ops_that_follow_each_other() -> None:
    """One alone takes 10 ms. Six behind each other take 40: the five behind the first add 6 each,
    so 4 ms of each are hidden."""
    streams = {1024: Stream(6, 0.040)}
    cost = calibrate._cost([(1024, 0.010), (1024, 0.010)], streams)
    assert cost.alone_s(1024) == pytest.approx(0.010)
    assert cost.latency_at(1024) == pytest.approx(0.004)
    assert cost.transfer_s(1024) == pytest.approx(0.006)


@pytest.mark.parametrize(
    ("method", "size", "dearer", "before", "goes_on"),
    [
        ("split", 64 << 10, 1.4, 1.0, True),
        ("split", 64 << 10, 1.6, 1.0, False),
        ("split", 32 << 10, 1.6, 1.0, True),  # that small, latencies may decide
        ("split", 64 << 10, 2.0, 2.5, True),  # it gets cheaper
        ("split", 64 << 10, 2.5, 2.0, False),
        ("allreduce", 64 << 10, 9.0, 1.0, True),
    ],
)
def test_what_gets_ever_dearer_is_measured_no_further(
    method: str, size: int, dearer: float, before: float, goes_on: bool
) -> None:
    assert calibrate._worthwhile(method, size, dearer, before) is goes_on


@pytest.mark.parametrize(
    ("factor", "holds"), [(1.0, True), (1.8, True), (0.6, True), (2.2, False), (0.45, False)]
)
def test_a_network_that_is_much_slower_or_faster_is_measured_anew(
    factor: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network.linear(1e-3, 1e9)

    def took(kind: str, ranks: Any, piece: Any, times: int) -> list[float]:
        return [factor * network.op(kind).alone_s(piece.gradients.nbytes)] * times

    monkeypatch.setattr(calibrate, "times_of", took)
    ranks = ranks_for(FakeGroup(Meeting(1), 0, None))
    assert calibrate._still_holds(network, ranks, torch.device("cpu"), EXACT) is holds
