"""``soonest bench --methods``: what each method of reducing costs."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import TYPE_CHECKING

from soonest.cli.request import NO_PICTURES, WrongRequestError, needs_lab
from soonest.writing import write_json

if TYPE_CHECKING:
    from soonest.bench.show import Screen

_OF_TRAINING = ("trace", "arms", "method", "timeline", "steps", "rounds", "slow_motion", "shrink")
_HOSTS, _LINK_BPS = 4, 1e9


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Measures, and shows what was found."""
    given = [name for name in _OF_TRAINING if getattr(args, name) is not None]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise WrongRequestError(f"--methods trains nothing: leave out {options}")
    if isinstance(args.link, str):
        raise WrongRequestError(
            f"--methods needs the rate of the links, not a load such as {args.link}: give for "
            "example --link 100mbit"
        )
    if args.picture and find_spec("matplotlib") is None:
        raise WrongRequestError(NO_PICTURES)
    needs_lab()
    from soonest.bench import methods_show, session

    hosts, link_bps = args.hosts or _HOSTS, args.link or _LINK_BPS
    with screen.work():
        costs = session.methods(hosts, link_bps, say=screen.say, watch=screen.watch)
    screen.say("")
    screen.show(methods_show.table(costs))
    for line in methods_show.remarks(costs):
        screen.say(line)
    if args.json:
        write_json(args.json, costs.to_json())
        screen.say(f"The record is in {args.json}")
    if args.picture:
        drawn = methods_show.draw(costs, args.picture)
        screen.say(f"The costs are drawn in {drawn}")
    return 0
