"""What others script against, as text: names, signatures, flags and environment variables.

``python -m surface`` in ``tests`` writes it to ``surface.txt``, when it is meant to change.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soonest
from soonest.cli.program import parser

TEXT = Path(__file__).with_suffix(".txt")
_SOURCE = Path(soonest.__file__).parent


def surface() -> str:
    """All of it, one line for each name."""
    parts = {
        "Package": _package(),
        "Environment": variables(),
        "Commands": _commands(parser(), "soonest"),
    }
    return "\n\n".join(f"{title}\n" + "\n".join(lines) for title, lines in parts.items()) + "\n"


def _package() -> Iterator[str]:
    for name in sorted(soonest.__all__):
        value = getattr(soonest, name)
        if inspect.isclass(value):
            above = value.__mro__[1:]
            base = next(b for b in above if not _is_ours(b) or b.__name__ in soonest.__all__)
            yield f"class {name}({base.__name__})"
            yield from (f"    {line}" for line in _members(value))
        elif inspect.isfunction(value):
            yield f"{name}{_signature(value)}"
        else:
            yield f"{name}: {', '.join(value)}"


def _members(cls: type) -> Iterator[str]:
    for name, value in sorted(inspect.getmembers(cls)):
        ours = any(name in base.__dict__ for base in cls.__mro__ if _is_ours(base))
        if not ours or (name.startswith("_") and name != "__init__"):
            continue
        if callable(value):
            yield f"{name}{_signature(value)}"
        else:
            yield name


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("soonest")


def _signature(function: Any) -> str:
    """Without types, which are checked elsewhere."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def variables() -> list[str]:
    """The environment variables that soonest reads."""
    texts = (path.read_text(encoding="utf-8") for path in _SOURCE.rglob("*.py"))
    return sorted({name for text in texts for name in re.findall(r'"(SOONEST_[A-Z]\w+)"', text)})


def _commands(one: argparse.ArgumentParser, words: str) -> Iterator[str]:
    below: dict[str, argparse.ArgumentParser] = {}
    said = []
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
        elif "--help" not in action.option_strings:
            said.append(_argument(action))
    yield " ".join([words, *said])
    for name, parser_below in below.items():
        yield from _commands(parser_below, f"{words} {name}")


def _argument(action: argparse.Action) -> str:
    name = "|".join(action.option_strings) or str(action.metavar or action.dest).upper()
    if action.choices is not None and not callable(action.choices):
        name += "={" + ",".join(map(str, action.choices)) + "}"
    return name if action.required else f"[{name}]"


if __name__ == "__main__":
    TEXT.write_text(surface(), encoding="utf-8")
