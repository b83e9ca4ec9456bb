"""Files are written whole or not at all, and by one way only."""

from __future__ import annotations

import ast
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from soonest import writing

SOURCE = Path(__file__).parent.parent / "src" / "soonest"
NOT_THE_USERS = {
    "bench/session.py": "settings in a temporary folder",
    "lab/namespaces.py": "the kernel's",
    "lab/registry.py": "a lab's entry, which it holds open while it runs",
    "caffe/io/log.py": "a new file each time, which grows while it is read",
    "writing.py": "the one way",
}


def direct_writes() -> Iterator[str]:
    """Files of the package in which something is written to a path without detour."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        allowed = set(within_replaced(tree))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or node in allowed:
                continue
            name = ast.unparse(node.func).split(".")[-1]
            opened = name == "open" and any(
                isinstance(argument, ast.Constant) and str(argument.value)[:1] in ("w", "a", "x")
                for argument in node.args[:2]
            )
            if opened or name in ("write_bytes", "touch"):
                yield str(path.relative_to(SOURCE))
            if name == "write_text" and isinstance(node.func, ast.Attribute):
                yield str(path.relative_to(SOURCE))


def within_replaced(tree: ast.Module) -> Iterator[ast.AST]:
    """What is written beside the old file, which it then replaces."""
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any(
            ast.unparse(item.context_expr).split("(")[0].endswith("replaced") for item in node.items
        ):
            yield from (inner for item in (*node.items, *node.body) for inner in ast.walk(item))


def test_only_what_is_not_the_users_is_written_directly() -> None:
    assert set(direct_writes()) <= set(NOT_THE_USERS)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_text(self: Path, text: str, **_: object) -> None:
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)


@pytest.mark.usefixtures("full_disk")
def test_on_a_full_disk_the_old_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    with file.open("w") as old:
        old.write("old")
    with pytest.raises(OSError, match="No space left"):
        writing.write_json(file, {"new": list(range(100))})
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for number in range(2):
        writing.write_json(file, {"number": number})
        assert file.read_text() == f'{{\n "number": {number}\n}}\n'
    assert list(tmp_path.iterdir()) == [file]
