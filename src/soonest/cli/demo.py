"""``soonest demo``: trains a small model twice, plain and with soonest, and compares."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soonest.cli.request import FailedError, WrongRequestError, at_least, new_file, rate
from soonest.writing import write_json

if TYPE_CHECKING:
    from soonest.core.timeline import Timeline


def add_to(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small GPT with and without soonest, and compare",
        description="Trains a small GPT on Python's own source code on two ranks, with plain "
        "DistributedDataParallel and with soonest in turn, and compares results and times.",
    )
    demo.add_argument(
        "--steps", type=at_least(2), default=100, metavar="N", help="training steps of each (100)"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="for the picture (out)"
    )
    demo.add_argument("--json", type=new_file, metavar="FILE", help="write the figures here")
    where = demo.add_mutually_exclusive_group()
    where.add_argument(
        "--link",
        type=rate,
        metavar="RATE",
        help="of the emulated hosts; by default one on which reducing the gradients takes about "
        "as long as computing them",
    )
    where.add_argument("--loopback", action="store_true", help="use no emulated hosts")
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from soonest.demo import session, show
    from soonest.demo.settings import Settings
    from soonest.lab import unavailable

    settings = Settings.of(args.steps)
    why_not = None if args.loopback else unavailable()
    if why_not and args.link:
        raise WrongRequestError(f"--link needs emulated hosts: {why_not}")
    with show.screen(settings) as screen:
        if args.loopback or why_not:
            screen.say(f"No emulated hosts{f': {why_not}' if why_not else ''}.")
            screen.say(
                "The ranks talk over loopback, which holds nothing up: the results must be the "
                "same, but expect no gain in speed."
            )
        result = session.run(
            settings,
            loopback=bool(args.loopback or why_not),
            asked_bps=args.link,
            say=screen.say,
            watch=screen.watch,
        )
    for line in show.summary(result):
        screen.say(line)
    if timelines := result.timelines():
        screen.picture(timelines)
        screen.say(_draw(timelines, args.out / "demo.png"))
    if args.json:
        write_json(args.json, result.to_json())
    if result.differences():
        raise FailedError("the results are not identical, which they must be")
    return 0


def _draw(timelines: list[Timeline], path: Path) -> str:
    try:
        from soonest.report.picture import draw
    except ImportError:
        return "No picture: that needs matplotlib, pip install 'soonest[report]'."
    return f"The same as a picture: {draw(timelines, path, title='One step of training')}"
