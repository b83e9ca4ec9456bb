"""Files that are remembered from one run to the next: small JSON in one folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soonest.writing import write_text


def place_of(kind: str, key: Mapping[str, Any]) -> Path | None:
    """The file for one kind of result; None if the user wants nothing kept.

    It lies in ``SOONEST_CACHE``, or else in ``~/.cache/soonest``.

    Args:
        kind: of what is remembered, the beginning of the file's name.
        key: all that it depends on, as JSON.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    where = folder()
    return None if where is None else where / f"{kind}-{name}.json"


def folder() -> Path | None:
    """The folder of the cache; None if the user wants nothing kept."""
    named = os.environ.get("SOONEST_CACHE")
    if named == "":
        return None
    if named is not None:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "soonest"


def recall(file: Path) -> Any:
    """Reads a file; None if there is none yet, or it can no longer be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def keep(file: Path, data: Any) -> bool:
    """Writes the file, whole or not at all; False where that is not possible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(data))
    except OSError:  # training goes on without a cache
        return False
    return True
