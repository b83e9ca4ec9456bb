"""The command ``soonest``: one file per subcommand, each a thin layer over the library."""

from soonest.cli.program import main

__all__ = ["main"]
