"""What follows from what the ranks told."""

from typing import Any

import pytest

from soonest.bench.progress import Progress
from soonest.bench.result import Result
from soonest.bench.settings import Settings
from soonest.core.trace import Layer, Trace

SETTINGS = Settings(
    Trace("t", (Layer("a", 1 << 20, 1e5, 2e5), Layer("b", 1 << 20, 1e5, 2e5))),
    hosts=4,
    link_bps=1e9,
    slow_motion=2.0,
    shrink=1.0,
    arms=("local", "ddp-tuned", "soonest"),
    steps=4,
    rounds=2,
)


def record(**arms: dict[str, Any]) -> dict[str, Any]:
    usual = {"load": 0.2, "compute_error": 0.0}
    return {
        "trace": "t",
        "hosts": 4,
        "link_bps": 2.5e9,
        "compute_ms": 30.0,
        "communication_ms": 20.0,
        "bound_ms": 32.0,
        "arms": {name.replace("_", "-"): {**usual, **arm} for name, arm in arms.items()},
        "timelines": {},
    }


def test_rows():
    result = Result(
        record(
            local={"step_ms": 30.0},
            ddp_tuned={"step_ms": 45.0},
            sequential={"step_ms": 55.0},
            soonest={"step_ms": 36.0},
        )
    )
    assert result.title == "t, 4 hosts, links of 2.5 Gbit/s"
    found = {row.arm: (row.over_bound, row.speedup, row.hidden) for row in result.rows()}
    assert found["local"][2] is None
    assert found["ddp-tuned"] == pytest.approx((45 / 32, 1.0, 0.25))
    assert found["sequential"][2] == 0.0, "it hides nothing, and never less than that"
    assert found["soonest"] == pytest.approx((36 / 32, 1.25, 0.7))
    assert result.warnings() == []


def test_without_the_baseline_there_is_no_speedup():
    assert [row.speedup for row in Result(record(ddp={"step_ms": 40.0})).rows()] == [None]


def test_it_warns_when_the_cores_limit_the_run():
    result = Result(
        record(ddp={"step_ms": 40.0, "load": 0.97}, soonest={"step_ms": 40.0, "load": 0.5})
    )
    (warning,) = result.warnings()
    assert "The cores, not the links, may have limited this run (load: ddp 97%)" in warning


def test_it_warns_when_the_replay_is_out_of_time():
    (warning,) = Result(record(ddp={"step_ms": 40.0, "compute_error": 0.023})).warnings()
    assert "cannot keep the time of the replayed compute (ddp +2.3%)" in warning


def told() -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for arm in SETTINGS.arms:
        messages.append({"kind": "making", "arm": arm})
        if arm == "ddp-tuned":
            swept = SETTINGS.sweep()
            messages += [{"kind": "tried", "arm": arm, "bucket": name} for name in swept]
        messages.append({"kind": "made", "arm": arm})
    messages += [
        {"kind": "round", "arm": arm, "round": number, "step_ms": 40.0}
        for number in range(SETTINGS.rounds)
        for arm in SETTINGS.arms
    ]
    return messages


def test_progress_gets_to_its_end_and_no_further(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("soonest.bench.progress.time.monotonic", lambda: now[0])
    progress = Progress(SETTINGS)
    assert progress.left_s is None
    shares = [progress.share]
    for message in told():
        now[0] += 1.0
        progress.take(message)
        shares.append(progress.share)
        if progress.left_s is not None:
            assert progress.left_s == pytest.approx(now[0] * (1 / progress.share - 1))
    assert shares == sorted(shares)
    assert max(shares[:-1]) < 1.0
    assert progress.share == pytest.approx(1.0)
    assert progress.left_s == pytest.approx(0.0, abs=1e-6)
    assert progress.doing == "soonest: 40.0 ms a step, round 2 of 2"
    assert progress.take({"kind": "figures"}) is False
