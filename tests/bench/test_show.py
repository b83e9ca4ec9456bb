"""What a comparison's table says, read off the table."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from soonest.bench.result import Result
from soonest.bench.show import _duration, _remarks, _table

TIMES = {"local": 30.0, "ddp-tuned": 45.0, "fsdp2": 55.0, "soonest": 36.0}


def result() -> Result:
    arms: dict[str, dict[str, Any]] = {
        arm: {"step_ms": ms, "load": 0.1, "compute_error": 0.0} for arm, ms in TIMES.items()
    }
    arms["ddp-tuned"] |= {"bucket": "4 MB", "sweep_ms": {"1 MB": 50.0, "4 MB": 45.0}}
    arms["soonest"]["methods"] = {"allreduce": 3, "gather": 1}
    return Result(
        {
            "trace": "t",
            "hosts": 4,
            "link_bps": 1e9,
            "shaped_link_bps": 2.5e8,
            "slow_motion": 2.0,
            "shrink": 2.0,
            "compute_ms": 30.0,
            "communication_ms": 20.0,
            "bound_ms": 32.0,
            "absent": {"horovod": "it is not installed"},
            "arms": arms,
        }
    )


def cells() -> dict[str, list[str]]:
    """By arm, what stands in each column."""
    table = _table(result())
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return {row[0]: list(row[1:5]) for row in zip(*columns, strict=True)}


def test_each_column_says_what_its_head_does():
    table = _table(result())
    assert [str(column.header) for column in table.columns][1:5] == [
        "step, ms", "× bound", "speed, ddp-tuned = 1", "communication hidden",
    ]  # fmt: skip
    assert cells() == {
        "local": ["30.00", "0.938", "1.500", ""],
        "ddp-tuned": ["45.00", "1.406", "1.000", "25%"],  # 15 of 20 ms are seen
        "fsdp2": ["55.00", "1.719", "0.818", "0%"],
        "soonest": ["36.00", "1.125", "1.250", "70%"],
        "horovod": ["absent", "", "", ""],
        "bound": ["32.00", "1", "", ""],
    }


def test_the_fastest_that_communicates_stands_out():
    table = _table(result())
    names = [str(cell) for cell in table.columns[0].cells]
    styles = {name: str(row.style) for name, row in zip(names, table.rows, strict=True)}
    assert [name for name, style in styles.items() if style == "bold green"] == ["soonest"]
    Console(quiet=True).print(table)


def test_the_remarks_tell_the_models_own_time():
    told = " ".join(_remarks(result()))
    assert "computing 30.00 ms, synchronizing 20.00 ms" in told
    assert "Here all took 2 times as long" in told
    assert "1/2 of their size, and links 250 Mbit/s" in told
    assert "ddp-tuned has buckets of 4 MB; short tries took, in ms: 1 MB 50.00, 4 MB 45.00." in told
    assert "Buckets of soonest: 3 by allreduce, 1 by gather." in told
    assert "horovod is absent: it is not installed." in told


def test_durations_in_words():
    assert [_duration(s) for s in (0.4, 59.4, 61.0, 600.0)] == [
        "0 s", "59 s", "1 min 01 s", "10 min 00 s",
    ]  # fmt: skip
