"""What a rank tells the process that started it: lines of JSON on its standard output."""

from __future__ import annotations

import json
import sys
from typing import Any

_MARK = "soonest-demo "


def tell(kind: str, **content: Any) -> None:
    """Sends a message."""
    sys.stdout.write(f"{_MARK}{json.dumps({'kind': kind, **content})}\n")
    sys.stdout.flush()


def heard(line: str) -> dict[str, Any] | None:
    """The message in a line of a rank's output; None if it is something else."""
    return json.loads(line.removeprefix(_MARK)) if line.startswith(_MARK) else None
