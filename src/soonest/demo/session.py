"""Runs the demo: starts the ranks, sets the network's rate, gathers what the ranks tell."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from soonest.demo.result import Result
from soonest.demo.settings import RANKS, Settings
from soonest.lab import Lab, Loopback
from soonest.lab.messages import listen

_AT_FIRST_BPS = 1e9
_SENDING = 1.2
"""How long reducing the gradients alone takes, in forward and backward passes. They take longer
themselves while something is sent, as the emulated network runs on the same cores."""
_MOST_BPS = 2e9
"""An emulated link of a higher rate would be limited by the CPU."""
_TIMEOUT_S = 1800.0

Say = Callable[[str], None]
Watch = Callable[[Result, str], None]


def run(
    settings: Settings,
    *,
    loopback: bool = False,
    asked_bps: float | None = None,
    say: Say,
    watch: Watch,
) -> Result:
    """Trains on two ranks.

    Args:
        settings: what to train.
        loopback: use no emulated hosts.
        asked_bps: rate of the emulated hosts' links, bits per second; by default one on which
            reducing all gradients takes about as long as computing them.
        say: gets sentences for the user.
        watch: gets the result so far and the name of an arm that has done one more step.

    Raises:
        SoonestError: a rank failed; what it said last has gone to ``say``.
    """
    with Loopback(RANKS) if loopback else Lab(RANKS, _AT_FIRST_BPS) as place:
        say("Measuring how long a forward and backward pass takes ...")
        measured: list[dict[str, Any]] = []
        _run(place, "measure", settings, say, lambda _, message: measured.append(message))
        compute_s = max(message["seconds"] for message in measured)
        size = measured[0]["gradient_bytes"]
        say(f"{compute_s * 1e3:.0f} ms, for {size / 1e6:.1f} MB of gradients.")
        link_bps = None
        if isinstance(place, Lab):
            # Of two ranks, each sends and receives as much as there are gradients.
            link_bps = asked_bps or min(8 * size / (_SENDING * compute_s), _MOST_BPS)
            for host in range(RANKS):
                place.set_link(host, link_bps)
            say(
                f"Two emulated hosts with links of {link_bps / 1e6:.0f} Mbit/s: "
                f"to reduce the gradients alone takes {8e3 * size / link_bps:.0f} ms."
            )
            if (cores := len(os.sched_getaffinity(0))) <= RANKS:
                say(
                    f"Ranks and emulated network share {cores} cores: what runs at the same time "
                    "slows each other down, which costs the faster arms most."
                )
        result = Result(settings, compute_s, size, link_bps)

        def take(rank: int, message: dict[str, Any]) -> None:
            result.take(rank, message)
            if rank == 0 and message["kind"] == "step":
                watch(result, message["arm"])

        _run(place, "train", settings, say, take)
    return result


def _run(
    place: Lab | Loopback,
    what: str,
    settings: Settings,
    say: Say,
    take: Callable[[int, dict[str, Any]], None],
) -> None:
    command = [sys.executable, "-m", "soonest.demo.rank", what, settings.to_text()]
    listen(place, command, take, say=say, timeout_s=_TIMEOUT_S)
