"""Runs what is measured: makes the hosts, starts the ranks, gathers what they tell."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from soonest.bench.methods import Costs, Measuring
from soonest.bench.progress import Progress, Work
from soonest.bench.result import Result, record_of
from soonest.bench.scale import Capacity
from soonest.bench.settings import KNOWN, VARIANTS, Settings
from soonest.errors import SoonestError
from soonest.lab import Lab
from soonest.lab.messages import Take, listen

_PROBED_BPS = 40e9
"""Links that hold nothing up."""
_TIMEOUT_S = 3600.0
_NEEDS = {"deepspeed-zero1": "deepspeed", "horovod": "horovod"}
_ALONE = "it needs several ranks on each host, and emulated hosts have one each"

Say = Callable[[str], None]
Watch = Callable[[Work], None]


def absent(arms: Sequence[str]) -> dict[str, str]:
    """Those arms that cannot run here, each with the reason."""
    found = {
        arm: f"{_NEEDS[arm]} is not installed"
        for arm in arms
        if arm in _NEEDS and find_spec(_NEEDS[arm]) is None
    }
    return found | {arm: _ALONE for arm in arms if arm == "soonest-hierarchical"}


def check_arms(arms: Sequence[str]) -> None:
    """Raises ValueError for an arm that does not exist, or twice the same."""
    for arm in arms:
        module, colon, function = arm.partition(":")
        if arm not in KNOWN and not (colon and module and function.isidentifier()):
            raise ValueError(f"no arm {arm!r}: there are {', '.join(KNOWN)}, or module:function")
        if colon and not _is_found(module):
            raise ValueError(
                f"no module {module!r} for arm {arm!r}: name one that 'python -c' could import"
            )
        if list(arms).count(arm) > 1:
            raise ValueError(f"arm {arm!r} is named twice: name each once")


def check_method(method: str, arms: Sequence[str]) -> None:
    """Raises ValueError if ``soonest`` cannot reduce by this method here, or is not compared."""
    arms_of = {options.get("method"): arm for arm, options in VARIANTS.items()}
    why_not = absent(list(VARIANTS))
    can = [name for name, arm in arms_of.items() if name and arm not in why_not]
    if method not in arms_of:
        raise ValueError(f"no method {method!r} for the arm soonest: there are {', '.join(can)}")
    if why := why_not.get(arms_of[method]):
        raise ValueError(f"method {method!r} cannot be had here: {why}")
    if "soonest" not in arms:
        raise ValueError("--method is for the arm soonest: name it in --arms, or no method")


def _is_found(module: str) -> bool:
    # As the ranks look for it: what "python -m" runs also finds what lies in the current folder.
    return PathFinder.find_spec(module.split(".")[0], [str(Path.cwd()), *sys.path]) is not None


def probe(hosts: int, *, say: Say) -> Capacity:
    """Measures what this machine can carry with so many hosts.

    Raises:
        SoonestError: a rank failed; what it said last has gone to ``say``.
    """
    told: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "soonest.bench.probe"]
    with Lab(hosts, _PROBED_BPS) as lab:
        _listen(lab, command, lambda _, message: told.append(message), say)
    return Capacity(**{name: value for name, value in told[0].items() if name != "kind"})


def methods(hosts: int, link_bps: float, *, say: Say, watch: Watch) -> Costs:
    """Measures what each method of reducing costs.

    Args:
        hosts: how many, one rank each.
        link_bps: of the emulated links, bits per second and direction.
        say, watch: see ``run``.

    Raises:
        SoonestError: a rank failed, what it said last has gone to ``say``; or a sum was wrong, so
            that there are no figures.
        ValueError: a lab cannot have such hosts or links.
    """
    progress = Measuring(link_bps)
    told: list[dict[str, Any]] = []

    def take(_: int, message: dict[str, Any]) -> None:
        told.append(message)
        if progress.take(message):
            watch(progress)

    began_s = time.monotonic()
    with Lab(hosts, link_bps) as lab:
        _listen(lab, [sys.executable, "-m", "soonest.bench.methods_rank"], take, say)
    for message in told:
        if message["kind"] == "wrong":
            raise SoonestError(f"no figures, for the sums are wrong: {message['fault']}")
    return Costs.of_told(hosts, link_bps, told, seconds=time.monotonic() - began_s)


def run(settings: Settings, *, name: str, say: Say, watch: Watch) -> Result:
    """Trains all arms in turn.

    Args:
        settings: what to compare; arms that are absent are left out and named in the record.
        name: of the trace, for the record.
        say: gets sentences for the user.
        watch: gets the progress whenever there is some.

    Raises:
        SoonestError: a rank failed, what it said last has gone to ``say``; or an arm ended with
            wrong parameters, so that there are no figures.
    """
    missing = absent(settings.arms)
    present = [arm for arm in settings.arms if arm not in missing]
    settings = replace(settings, arms=present)
    progress = Progress(settings)
    told: dict[str, dict[str, Any]] = {}

    def take(_: int, message: dict[str, Any]) -> None:
        told[message["kind"]] = message
        if progress.take(message):
            watch(progress)

    with tempfile.TemporaryDirectory() as folder, Lab(settings.hosts, settings.shaped_bps) as lab:
        file = Path(folder) / "settings.json"
        file.write_text(json.dumps(settings.to_json()), encoding="utf-8")
        command = [sys.executable, "-m", "soonest.bench.rank", str(file)]
        _listen(lab, command, take, say)
    if "wrong" in told:
        raise SoonestError(f"no figures, for the results are wrong: {told['wrong']['faults'][0]}")
    return Result(record_of(settings, name, missing, told["figures"]))


def _listen(lab: Lab, command: Sequence[str], take: Take, say: Say) -> None:
    listen(lab, command, take, say=say, timeout_s=_TIMEOUT_S, preload=True)
