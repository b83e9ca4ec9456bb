"""``python -m soonest.pycaffe script.py``: runs a script that says ``import caffe``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from soonest.pycaffe.alias import provide


def main() -> None:
    """Runs a script for which ``import caffe`` finds ``soonest.pycaffe``."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit("usage: python -m soonest.pycaffe script.py [arguments of the script]")
    del sys.argv[0]
    if not Path(sys.argv[0]).is_file():
        sys.exit(f"soonest: there is no script {sys.argv[0]}")
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    provide()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
