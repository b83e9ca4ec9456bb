"""``soonest bench``: soonest beside its peers, on the same work."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soonest.cli import methods
from soonest.cli.request import (
    NO_PICTURES,
    WrongRequestError,
    at_least,
    factor,
    needs_lab,
    new_file,
    rate,
)
from soonest.writing import write_json

if TYPE_CHECKING:
    from soonest.bench.result import Result
    from soonest.bench.show import Screen

_FIXED = ("arms", "method", "steps", "rounds", "slow_motion", "shrink")
"""What the suite chooses itself, so that its rows can be compared."""
_LOAD = re.compile(r"([\d.]+)x")


def add_to(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="compare soonest with its peers on emulated hosts",
        description="Replays a model's compute on emulated hosts and trains it in several ways in "
        "turn, in the same processes. Figures are given only if all parameters end right.",
    )
    bench.add_argument("--trace", metavar="NAME|FILE", help="the model (alexnet)")
    bench.add_argument("--hosts", type=at_least(2), metavar="N", help="how many (4)")
    bench.add_argument(
        "--link",
        type=link,
        metavar="RATE",
        help="of the cluster's links, e.g. 25gbit; or 2x: synchronizing takes twice as long as "
        "computing (1x)",
    )
    bench.add_argument(
        "--slow-motion", type=factor, metavar="D", help="multiply every time (what cores can do)"
    )
    bench.add_argument(
        "--shrink", type=factor, metavar="S", help="divide every size (what cores can do)"
    )
    bench.add_argument(
        "--arms",
        metavar="A,B,...",
        help="what to compare (all); also soonest-METHOD, as in soonest-gather",
    )
    bench.add_argument(
        "--method", metavar="METHOD", help="reduce every bucket of the arm soonest so (cheapest)"
    )
    bench.add_argument(
        "--steps", type=at_least(1), metavar="K", help="counted, per arm and round (6)"
    )
    bench.add_argument("--rounds", type=at_least(1), metavar="R", help="turns of each arm (2)")
    bench.add_argument("--json", type=new_file, metavar="FILE", help="write the record here")
    bench.add_argument("--picture", type=new_file, metavar="PNG", help="draw the step times here")
    bench.add_argument(
        "--timeline", type=new_file, metavar="PNG", help="draw a step of ddp-tuned and soonest here"
    )
    what = bench.add_mutually_exclusive_group()
    what.add_argument(
        "--suite",
        action="store_true",
        help="run the standing table, as far as it has no records, and write its page; --trace, "
        "--hosts and --link narrow it down",
    )
    what.add_argument(
        "--methods",
        action="store_true",
        help="train nothing, measure what each method of reducing a tensor costs by size, on "
        "links of the rate --link (1gbit)",
    )
    what.add_argument(
        "--show", nargs="+", type=Path, metavar="RECORD", help="run nothing, show these records"
    )
    bench.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks"),
        metavar="DIR",
        help="of the suite (%(default)s)",
    )
    bench.set_defaults(run=run)


def link(text: str) -> float | str:
    """A rate in bits per second, or a load such as ``0.5x``."""
    match = _LOAD.fullmatch(text)
    if match is None:
        return rate(text)
    try:
        factor(match[1])
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no load: give for example 0.5x") from None
    return text


def run(args: argparse.Namespace) -> int:
    try:
        from soonest.bench.show import Screen
    except ImportError:
        raise WrongRequestError("this needs rich: pip install 'soonest[report]'") from None
    screen = Screen()
    try:
        if args.show:
            results = [_read(path) for path in args.show]
        elif args.suite:
            return _suite(args, screen)
        elif args.methods:
            return methods.run(args, screen)
        else:
            results = [_compare(args, screen)]
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    for result in results:
        screen.result(result)
    _write(args, results, screen)
    return 0


def _compare(args: argparse.Namespace, screen: Screen) -> Result:
    from soonest.bench import scale, session
    from soonest.bench.settings import ARMS, Settings, link_for
    from soonest.core.trace import Trace

    name = args.trace or "alexnet"
    trace, hosts = Trace.load(name), args.hosts or 4
    if not trace.total_bytes:
        raise ValueError(f"trace {name!r} has no parameters: there is nothing to synchronize")
    arms = args.arms.split(",") if args.arms else list(ARMS)
    session.check_arms(arms)
    if args.method is not None:
        session.check_method(args.method, arms)
    needs_lab()
    link = "1x" if args.link is None else args.link
    link_bps = link_for(trace, hosts, float(link[:-1])) if isinstance(link, str) else link
    slow_motion, shrink = args.slow_motion, args.shrink
    if slow_motion is None or shrink is None:
        screen.say(f"Measuring what this machine can carry with {hosts} hosts ...")
        capacity = session.probe(hosts, say=screen.say)
        slow_motion, shrink = scale.choose(
            trace, hosts, link_bps, capacity, slow_motion=slow_motion, shrink=shrink
        )
    steps, rounds = args.steps or 6, args.rounds or 2
    settings = Settings(
        trace, hosts, link_bps, slow_motion, shrink, arms, steps, rounds, args.method
    )
    screen.say(
        f"{name} on {hosts} hosts: slow motion {slow_motion:g}, shrink {shrink:g}, emulated links "
        f"of {settings.shaped_bps / 1e6:.3g} Mbit/s"
    )
    with screen.work():
        return session.run(settings, name=name, say=screen.say, watch=screen.watch)


def _suite(args: argparse.Namespace, screen: Screen) -> int:
    try:
        from soonest.bench import page, suite
    except ImportError:
        raise WrongRequestError(NO_PICTURES) from None

    given = [f"--{name.replace('_', '-')}" for name in _FIXED if getattr(args, name) is not None]
    if given:
        raise WrongRequestError(f"the suite chooses that itself: leave out {', '.join(given)}")
    needs_lab()
    load = args.link
    if load is not None and not isinstance(load, str):
        raise WrongRequestError("the suite's links are given by load: --link 0.5x, 1x or 2x")
    chosen = suite.cases(
        (args.trace,) if args.trace else suite.TRACES,
        (args.hosts,) if args.hosts else suite.HOSTS,
        (float(load[:-1]),) if load else suite.LOADS,
    )
    records = args.out / "records"
    with screen.work():
        for _, result in suite.run(chosen, records, say=screen.say, watch=screen.watch):
            screen.result(result)
            page.write(suite.read(records), args.out)
    page.write(suite.read(records), args.out)
    _write(args, [result for case, result in suite.read(records).items() if case in chosen], screen)
    screen.say(f"The table is in {args.out / 'README.md'}, the records in {records}")
    return 0


def _read(path: Path) -> Result:
    from soonest.bench.result import Result

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no record: {error}") from None
    result = Result(record)
    try:
        _ = result.title, result.rows(), result.warnings()
    except KeyError as error:
        raise ValueError(f"{path} is no record of soonest bench: {error} is missing") from None
    except (TypeError, AttributeError):
        raise ValueError(f"{path} is no record of soonest bench: give one record a file") from None
    return result


def _write(args: argparse.Namespace, results: list[Result], screen: Screen) -> None:
    if args.json:
        records = [result.record for result in results]
        write_json(args.json, records[0] if len(records) == 1 else records)
        screen.say(f"The record is in {args.json}")
    if args.picture or args.timeline:
        try:
            from soonest.bench.page import panel
            from soonest.report import bars, picture
        except ImportError:
            raise WrongRequestError(NO_PICTURES) from None
        if args.picture:
            drawn = bars.draw([panel(result) for result in results], args.picture)
            screen.say(f"The step times are drawn in {drawn}")
        timelines = [timeline for result in results for timeline in result.timelines()]
        if args.timeline and timelines:
            title = f"One step of {results[0].title}"
            drawn = picture.draw(timelines, args.timeline, title=title)
            screen.say(f"A step is drawn in {drawn}")
