"""``python -m soonest`` is the command ``soonest``."""

import sys

from soonest.cli import main

if __name__ == "__main__":
    sys.exit(main())
