"""Imports go downward only, and the core knows no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "soonest"

ROOT = "soonest"
"""The package itself, ``import soonest``: what users import, above the runtime."""
ERRORS = "errors"
WRITING = "writing"
LOGS = "logs"
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    ERRORS: set(),
    WRITING: set(),
    LOGS: set(),
    "runtime": {"core", ERRORS, WRITING, LOGS},
    "lab": {"core", ERRORS, WRITING, "runtime", ROOT},
    "bench": {"core", ERRORS, WRITING, "runtime", "lab", "report", ROOT},
    "report": {"core", ERRORS, WRITING},
    "caffe": {"core", ERRORS, WRITING, "runtime", ROOT},
    "pycaffe": {"caffe"},
    "integrations": {"core", ERRORS, WRITING, "runtime", ROOT},
    "demo": {"core", ERRORS, WRITING, "runtime", "lab", "bench", "report", ROOT},
    "cli": {
        "core", ERRORS, WRITING, "runtime", "lab", "bench", "report", "caffe", "integrations",
        "demo", ROOT,
    },
    "__main__": {"cli"},
    "__init__": {"core", ERRORS, "runtime"},
}  # fmt: skip
"""Per part of the package, the other parts that it may import."""

ROOMS: dict[str, list[str]] = {
    "core": [
        "forecast", "planner", "simulator", "trace", "timeline", "cost", "fitting", "plan", "flat",
        "units",
    ],
    "runtime": [
        "ddp", "api", "setup", "handle", "tuning", "engine", "validate", "execute", "optim",
        "timing", "agreement", "flat", "guard", "options", "comm", "device",
    ],
    "caffe": ["tools", "solver", "net", "data", "layers", "io", "proto", "files"],
}  # fmt: skip
"""The rooms of a part, from the top: each may import only those below it, but for types."""
MOST_ROOMS = 16
MOST_LINES = 300
"""Of a file where rooms are small: a longer one is two."""


def imported(source: str, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every module that a source text imports anywhere in it, in full, with its line."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def upward(source: str, path: str) -> list[str]:
    """What a file of a room imports from a room above it."""
    part, room = path.removesuffix(".py").split("/")[:2]
    if room == "__init__":  # what the part shows
        return []
    rooms = ROOMS[part]
    if room not in rooms:
        return [f"{path}: no rule says where {room!r} stands: add it"]
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                child.body = [ast.Pass()]
    found: list[str] = []
    for line, name in imported(ast.unparse(tree), "", is_package=False):
        top, _, rest = name.partition(f"{ROOT}.{part}.")
        other = rest.split(".")[0]
        if not top and other in rooms and rooms.index(other) < rooms.index(room):
            found.append(f"{path}:{line} imports {name}")
    return found


def violations(source: str, path: str) -> list[str]:
    """What a file of the package imports but may not.

    Args:
        source: its text.
        path: relative to the package, for example ``core/plan.py``.
    """
    parts = path.removesuffix(".py").split("/")
    is_package = parts[-1] == "__init__"
    module = ".".join([ROOT, *(parts[:-1] if is_package else parts)])
    part = parts[0]
    if part not in ALLOWED:
        return [f"{path}: no rule says what {part!r} may import: add one"]
    found: list[str] = []
    for line, name in imported(source, module, is_package=is_package):
        top, *rest = name.split(".")
        if top == "torch" and part == "core":
            found.append(f"{path}:{line} imports {name}")
        if top == ROOT:
            target = rest[0] if rest and rest[0] in ALLOWED else ROOT
            if target != part and target not in ALLOWED[part]:
                found.append(f"{path}:{line} imports {name}")
    return found


def test_imports_go_downward_only():
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 10
    found = [
        violation
        for file in files
        for violation in violations(
            file.read_text(encoding="utf-8"), file.relative_to(SOURCE).as_posix()
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("part", ROOMS)
def test_rooms_import_only_those_below(part: str):
    assert len(ROOMS[part]) <= MOST_ROOMS
    found = [
        violation
        for file in sorted((SOURCE / part).rglob("*.py"))
        for violation in upward(
            file.read_text(encoding="utf-8"), file.relative_to(SOURCE).as_posix()
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/comm/ops.py", "from soonest.runtime.engine import engine"),
        ("runtime/comm/ops.py", "from soonest.runtime import engine"),
        ("runtime/flat/buffers.py", "def f():\n    from soonest.runtime.optim.patch import clear"),
        ("core/plan.py", "import soonest.core.planner.bounds"),
        ("caffe/attic/old.py", ""),
    ],
)
def test_an_import_from_above_is_found(path: str, source: str):
    assert len(upward(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/engine/engine.py", "from soonest.runtime import comm\nimport torch"),
        ("runtime/comm/ops.py", "from soonest.runtime.comm.waiting import look"),
        (
            "runtime/comm/ops.py",
            "if TYPE_CHECKING:\n    from soonest.runtime.engine.engine import Engine",
        ),
        ("runtime/__init__.py", "from soonest.runtime.api import prioritize"),
    ],
)
def test_imports_from_below_are_let_through(path: str, source: str):
    assert upward(source, path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/plan.py", "import torch"),
        ("core/plan.py", "from torch.nn import Module"),
        ("core/plan.py", "import numpy, torch.distributed as dist"),
        ("core/plan.py", "def f():\n    import torch"),
        ("core/plan.py", "if TYPE_CHECKING:\n    from soonest.runtime.engine.engine import Engine"),
        ("core/plan.py", "from soonest import prioritize"),
        ("core/plan.py", "import soonest"),
        ("core/plan.py", "from soonest.errors import SoonestError"),
        ("core/plan.py", "from ..runtime import engine"),
        ("core/plan.py", "from .. import runtime"),
        ("core/__init__.py", "from ..runtime import engine"),
        ("runtime/api.py", "from soonest.lab import hosts"),
        ("runtime/api.py", "from soonest import report"),
        ("runtime/api.py", "import soonest.bench.arms"),
        ("runtime/api.py", "from soonest import prioritize"),
        ("lab/hosts.py", "from soonest.bench import arms"),
        ("report/text.py", "from soonest.runtime.api import Handle"),
        ("report/text.py", "import soonest.cli"),
        ("bench/arms.py", "from soonest.cli import main"),
        ("caffe/net.py", "from soonest import cli"),
        ("errors.py", "import soonest.core.plan"),
        ("__init__.py", "from soonest.cli import main"),
        ("news/new.py", ""),
    ],
)
def test_a_violation_is_found(path: str, source: str):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/plan.py", "import numpy as np\nfrom soonest.core.trace import Trace"),
        ("core/plan.py", "from . import trace\nfrom .trace import Trace\nfrom ..core import trace"),
        ("core/plan.py", "import torchless\ntext = 'import torch'"),
        ("runtime/api.py", "import torch\nfrom soonest.core import plan\nfrom . import engine"),
        ("report/text.py", "import rich\nfrom soonest.core.timeline import Timeline"),
        ("bench/arms.py", "import soonest\nfrom soonest.lab import hosts"),
        ("cli/bench.py", "from soonest import bench, report\nfrom soonest.cli.request import x"),
        ("__main__.py", "from soonest.cli import main"),
        ("__init__.py", "from soonest.runtime import prioritize"),
    ],
)
def test_what_is_allowed_is_let_through(path: str, source: str):
    assert violations(source, path) == []


IMPORT_ALL_OF_THE_CORE = """
import importlib, pkgutil, sys
import soonest.core
for module in pkgutil.walk_packages(soonest.core.__path__, "soonest.core."):
    importlib.import_module(module.name)
print(*sorted(name for name in sys.modules if name.partition(".")[0] in ("soonest", "torch")))
"""


def test_the_core_runs_without_torch():
    loaded = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL_OF_THE_CORE],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "soonest.core.planner.planner" in loaded
    assert not [name for name in loaded if name.partition(".")[0] == "torch"]
    assert not [name for name in loaded if name.startswith("soonest.runtime")]


@pytest.mark.parametrize("part", ["core", "runtime"])
def test_no_file_is_long(part: str) -> None:
    lines = {p: p.read_text(encoding="utf-8").count("\n") for p in (SOURCE / part).rglob("*.py")}
    assert [f"{path.name}: {count}" for path, count in lines.items() if count > MOST_LINES] == []
