"""``soonest demo``: trains a small model twice, plain and with soonest, and compares."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from soonest.cli.request import FailedError, at_least, new_file, rate


def add_to(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small GPT with and without soonest, and compare",
        description="Trains a small GPT on Python's own source code on two ranks, with plain "
        "DistributedDataParallel and with soonest in turn, and compares results and times.",
    )
    demo.add_argument("--steps", type=at_least(1), metavar="N", help="training steps of each")
    demo.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="for the picture"
    )
    demo.add_argument("--json", type=new_file, metavar="FILE", help="write the figures here")
    where = demo.add_mutually_exclusive_group()
    where.add_argument(
        "--link",
        type=rate,
        metavar="RATE",
        help="of the emulated hosts; by default one on which sharing the gradients takes as long "
        "as computing them",
    )
    where.add_argument("--loopback", action="store_true", help="no emulated hosts")
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    raise FailedError("not yet")
