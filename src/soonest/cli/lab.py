"""``soonest lab``: run anything on emulated hosts."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from soonest.cli.request import FailedError, WrongRequestError, at_least, new_file, rate
from soonest.writing import write_json

if TYPE_CHECKING:
    from soonest.lab.registry import RunningLab


def add_to(commands: Any) -> None:
    lab = commands.add_parser(
        "lab",
        help="run a command on emulated hosts",
        description="A cluster in one machine: emulated hosts, joined by links of a chosen rate.",
    )
    verbs = lab.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(verbs)
    _add_link(verbs)
    verbs.add_parser(
        "list", help="list the labs that run", description="Lists the labs that run, one a line."
    ).set_defaults(run=list_)
    _add_check(verbs)


def _add_run(verbs: Any) -> None:
    run_ = verbs.add_parser(
        "run",
        help="run a command once per emulated host",
        description="Runs COMMAND once per emulated host, with the variables that torchrun sets. "
        "When one fails, the others are ended, and its exit code is returned. SIGINT and SIGHUP "
        "are passed on to all; a second SIGINT ends them.",
    )
    run_.add_argument("--hosts", type=at_least(1), required=True, metavar="N", help="how many")
    run_.add_argument(
        "--link", type=rate, required=True, metavar="RATE", help="of every host, e.g. 200mbit"
    )
    run_.add_argument(
        "--uplink",
        type=rate,
        nargs="+",
        metavar="RATE",
        help="at which hosts send, if not as they receive: one for all, or one for each",
    )
    run_.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    run_.set_defaults(run=run)


def _add_link(verbs: Any) -> None:
    link_ = verbs.add_parser(
        "link",
        help="change a link of a lab that runs",
        description="Changes the link of one host of a lab that runs in another terminal.",
    )
    link_.add_argument("--host", type=at_least(0), required=True, metavar="N", help="0 or more")
    link_.add_argument(
        "--lab", type=at_least(1), metavar="ID", help="which lab, if several run: see 'list'"
    )
    change = link_.add_mutually_exclusive_group(required=True)
    change.add_argument("--rate", type=rate, metavar="RATE", help="the new one, both directions")
    change.add_argument("--down", action="store_true", help="unplug it")
    change.add_argument("--up", action="store_true", help="plug it in again")
    link_.set_defaults(run=link)


def _add_check(verbs: Any) -> None:
    check_ = verbs.add_parser(
        "check",
        help="measure what links really carry here",
        description="Says whether the lab works here, or what is missing, and measures what its "
        "links carry of the rate asked for.",
    )
    check_.add_argument(
        "--link", type=rate, nargs="+", metavar="RATE", help="to measure (10mbit 100mbit 1gbit)"
    )
    check_.add_argument("--json", type=new_file, metavar="FILE", help="write the figures here")
    check_.set_defaults(run=check)


def run(args: argparse.Namespace) -> int:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise WrongRequestError(
            "no command to run: put it behind --, as in 'soonest lab run ... -- python x.py'"
        )

    from soonest.lab import Lab, unavailable

    uplink_bps = args.uplink[0] if args.uplink and len(args.uplink) == 1 else args.uplink
    with _saying_what_is_wrong():
        lab = Lab(args.hosts, args.link, uplink_bps=uplink_bps)
        if why := unavailable():
            raise WrongRequestError(why)
        with lab:
            return lab.run(
                command, on_failure=_say_failure, passed_on=(signal.SIGINT, signal.SIGHUP)
            )


def _say_failure(rank: int, code: int) -> None:
    print(f"soonest: rank {rank} failed first, with exit code {code}", file=sys.stderr, flush=True)


def link(args: argparse.Namespace) -> int:
    with _saying_what_is_wrong():
        links = _chosen(args.lab).links
        if args.rate is not None:
            links.set_rate(args.host, args.rate)
        elif args.down:
            links.cut(args.host)
        else:
            links.mend(args.host)
    return 0


def _chosen(number: int | None) -> RunningLab:
    from soonest.lab.registry import running_labs

    labs = running_labs()
    if not labs:
        raise WrongRequestError("no lab runs here: start one with 'soonest lab run'")
    chosen = [lab for lab in labs if number in (None, lab.id)]
    if len(chosen) == 1:
        return chosen[0]
    running = ", ".join(
        f"{lab.id} ({textwrap.shorten(_shell(lab), 40, placeholder=' ...')})" for lab in labs
    )
    what = "several labs run" if chosen else f"no lab {number} runs"
    raise WrongRequestError(f"{what}: give --lab one of {running}")


def list_(_: argparse.Namespace) -> int:
    from soonest.lab.registry import running_labs

    with _saying_what_is_wrong():
        labs = running_labs()
    for lab in labs:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lab.since_s))
        hosts = f"{lab.hosts} host{'s' * (lab.hosts > 1)}"
        print(f"{lab.id}  {hosts}  {_rate_text(lab.link_bps)}  since {since}  {_shell(lab)}")
    return 0


def check(args: argparse.Namespace) -> int:
    from soonest.lab.check import RATES_BPS, check_links
    from soonest.lab.links import PAYLOAD_SHARE
    from soonest.lab.requirements import problems

    if found := problems():
        for problem in found[:-1]:
            print(f"soonest: {problem}", file=sys.stderr)
        raise WrongRequestError(found[-1])
    with _saying_what_is_wrong():
        links = check_links(
            args.link or RATES_BPS,
            lambda bps: print(f"measuring {_rate_text(bps)} ...", file=sys.stderr, flush=True),
        )
    print(f"{'asked':>10}  {'carried payload':>15}  {'share':>6}  {'expected':>8}")
    for one in links:
        asked, carried = _rate_text(one.asked_bps), _rate_text(one.payload_bps)
        print(f"{asked:>10}  {carried:>15}  {one.share:>6.1%}  {PAYLOAD_SHARE:>8.1%}")
    if args.json:
        write_json(args.json, {"links": [one.to_json() for one in links]})
    return 0


@contextlib.contextmanager
def _saying_what_is_wrong() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    except RuntimeError as error:
        raise FailedError(str(error)) from None


def _shell(lab: RunningLab) -> str:
    """What runs on a lab, in one line."""
    return " ".join(shlex.join(lab.command).split()) or "idle"


def _rate_text(bps: float) -> str:
    for unit, size in (("gbit", 1e9), ("mbit", 1e6)):
        if bps >= size:
            return f"{bps / size:.4g}{unit}"
    return f"{bps / 1e3:.4g}kbit"
