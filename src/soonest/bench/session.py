"""Runs a comparison: makes the hosts, starts the ranks, gathers what they tell."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from soonest.bench.progress import Progress
from soonest.bench.result import Result, record_of
from soonest.bench.scale import Capacity
from soonest.bench.settings import ARMS, Settings
from soonest.errors import SoonestError
from soonest.lab import Lab
from soonest.lab.messages import Take, listen

_PROBED_BPS = 40e9
"""Links that hold nothing up."""
_TIMEOUT_S = 3600.0
_NEEDS = {"deepspeed-zero1": "deepspeed", "horovod": "horovod"}

Say = Callable[[str], None]
Watch = Callable[[Progress], None]


def absent(arms: Sequence[str]) -> dict[str, str]:
    """Those arms that cannot run here, each with the reason."""
    return {
        arm: f"{_NEEDS[arm]} is not installed"
        for arm in arms
        if arm in _NEEDS and find_spec(_NEEDS[arm]) is None
    }


def check_arms(arms: Sequence[str]) -> None:
    """Raises ValueError for an arm that does not exist, or twice the same."""
    for arm in arms:
        module, colon, function = arm.partition(":")
        if arm not in ARMS and not (colon and module and function.isidentifier()):
            raise ValueError(f"no arm {arm!r}: there are {', '.join(ARMS)}, or module:function")
        if colon and not _is_found(module):
            raise ValueError(
                f"no module {module!r} for arm {arm!r}: name one that 'python -c' could import"
            )
        if list(arms).count(arm) > 1:
            raise ValueError(f"arm {arm!r} is named twice: name each once")


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
