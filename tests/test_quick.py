"""``make quick`` runs something of every room of every part, and nothing that is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
LIST = TESTS / "quick.txt"
CHOSEN = LIST.read_text(encoding="utf-8").splitlines()


def rooms() -> list[str]:
    """Folders with modules, by where their tests are; and what else has tests."""
    source = ROOT / "src" / "soonest"
    modules = [path.parent.relative_to(source) for path in source.glob("*/**/*.py")]
    tests = [path.parent.relative_to(TESTS) for path in TESTS.glob("*/**/test_*.py")]
    return sorted({str(room) for room in (*map(where_tested, modules), *tests)})


def where_tested(room: Path) -> Path:
    """The folder of a room's tests: its own, or that of the room around it."""
    return room if len(room.parts) == 1 or (TESTS / room).is_dir() else where_tested(room.parent)


@pytest.mark.parametrize("room", rooms())
def test_every_room_has_a_quick_test(room: str) -> None:
    said = f"add a test of tests/{room} that takes a second or two to {LIST.relative_to(ROOT)}"
    assert any(Path(one.split("::")[0]).parent == Path("tests", room) for one in CHOSEN), said


@pytest.mark.parametrize("chosen", CHOSEN)
def test_what_is_chosen_is_there(chosen: str) -> None:
    file, _, test = chosen.partition("::")
    assert (ROOT / file).is_file()
    name = test.partition("[")[0]
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") or not test
    assert CHOSEN.count(chosen) == 1
