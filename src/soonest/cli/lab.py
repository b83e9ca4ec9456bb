"""``soonest lab``: run anything on emulated hosts."""

from __future__ import annotations

import argparse
from typing import Any

from soonest.cli.request import FailedError, WrongRequestError, at_least, rate


def add_to(commands: Any) -> None:
    lab = commands.add_parser(
        "lab",
        help="run a command on emulated hosts",
        description="A cluster in one machine: emulated hosts, joined by links of a chosen rate.",
    )
    verbs = lab.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run_ = verbs.add_parser(
        "run",
        help="run a command once per emulated host",
        description="Runs COMMAND once per emulated host, with the variables that torchrun sets.",
    )
    run_.add_argument("--hosts", type=at_least(1), required=True, metavar="N", help="how many")
    run_.add_argument(
        "--link", type=rate, required=True, metavar="RATE", help="of every host, e.g. 200mbit"
    )
    run_.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    run_.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise WrongRequestError(
            "no command to run: put it behind --, as in 'soonest lab run ... -- python x.py'"
        )

    from soonest.lab import Lab, unavailable

    if why := unavailable():
        raise WrongRequestError(why)
    try:
        with Lab(hosts=args.hosts, link_bps=args.link) as lab:
            code = lab.run(command)
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    if code:
        raise FailedError(f"the command ended with exit code {code}")
    return 0
