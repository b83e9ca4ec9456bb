"""What is remembered from one run to the next: files that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from soonest.runtime.tuning.cache import folder, keep, place_of, recall


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOONEST_CACHE", str(tmp_path / "cache"))


def place(kind: str = "x", **key: object) -> Path:
    found = place_of(kind, key)
    assert found is not None
    return found


def test_what_is_kept_is_recalled() -> None:
    file = place(model="a")
    assert recall(file) is None
    assert keep(file, {"steps": [1, 2]})
    assert recall(file) == {"steps": [1, 2]}
    assert list(file.parent.iterdir()) == [file]


def test_a_file_that_another_run_reads_is_replaced_and_not_written_to() -> None:
    file = place(model="a")
    keep(file, {"first": 1})
    with file.open(encoding="utf-8") as reader:
        keep(file, {"second": "much longer than the first one was"})
        assert json.load(reader) == {"first": 1}
    assert recall(file) == {"second": "much longer than the first one was"}


def test_half_a_file_is_none() -> None:
    file = place(model="a")
    keep(file, {"first": 1})
    file.write_text('{"fir', encoding="utf-8")
    assert recall(file) is None


def test_a_place_depends_on_everything_but_the_order() -> None:
    assert place(model="a", ranks=2) == place(ranks=2, model="a")
    others = [place(model="a"), place(model="b"), place(ranks=2), place("y", model="a")]
    assert len(set(others)) == 4


def test_nothing_is_kept_where_nobody_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOONEST_CACHE", "")
    assert folder() is None
    assert place_of("x", {}) is None
    monkeypatch.delenv("SOONEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "soonest"


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert keep(place(model="a"), 1) is False
