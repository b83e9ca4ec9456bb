"""The parser of the whole command line, and what its exit codes mean."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata

from soonest.cli import bench, caffe, demo, env, lab, predict
from soonest.cli.request import FailedError, Parser, WrongRequestError
from soonest.errors import SoonestError

COMMANDS = (bench, demo, lab, predict, caffe, env)

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def parser() -> Parser:
    top = Parser(prog="soonest", description="Soonest needed, soonest sent.")
    top.add_argument(
        "--version", action="version", version=f"soonest {metadata.version('soonest')}"
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: its words; by default those of this process.

    Returns:
        The exit code: 0 done, 1 it failed, 2 the request was wrong, 130 interrupted.
    """
    try:
        return _run(argv)
    finally:
        if argv is None:  # The process ends: a Ctrl-C now would only cut through that.
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = parser().parse_args(argv)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except SystemExit as over:  # --help and --version have been answered.
        return int(over.code or DONE)
    except WrongRequestError as wrong:
        return _say(wrong, WRONG)
    except (FailedError, SoonestError) as failed:
        return _say(failed, FAILED)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:  # who reads has read enough, as in ``soonest predict | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _say(why: Exception | str, code: int) -> int:
    line = " ".join(str(why).split())
    print(f"soonest: {line}", file=sys.stderr)
    return code
