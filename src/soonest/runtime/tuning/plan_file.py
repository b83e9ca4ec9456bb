"""Plans that the user gives: read, compared with what is here, and saved."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from soonest.core.plan import Flat, Plan, first_difference
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.writing import write_json


def load(plan: Plan | str | Path | None) -> Plan | None:
    """Reads the plan that was given, if it is a file.

    Raises:
        ValueError: it cannot be read.
    """
    if plan is None or isinstance(plan, Plan):
        return plan
    try:
        return Plan.from_json(json.loads(Path(plan).read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"cannot read plan {str(plan)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{str(plan)!r} holds no plan: {error}") from error


def save(plan: Plan, path: str | Path) -> None:
    """Writes a plan as JSON, whole or not at all."""
    write_json(path, plan.to_json())


def check(plan: Plan, layout: FlatBuffers, ranks: int) -> None:
    """Raises ValueError if a plan is not for this model and group."""
    if wrong := _misfit(plan, layout, ranks):
        raise ValueError(
            f"the plan is not for this model and group: {wrong}. Leave out plan=, or give one "
            "that was saved with this model on as many ranks"
        )


def fits(plan: Plan, layout: FlatBuffers, ranks: int) -> bool:
    """Whether a plan is for this model and group."""
    return _misfit(plan, layout, ranks) is None


def _misfit(plan: Plan, layout: FlatBuffers, ranks: int) -> str | None:
    """Says in words where a plan first differs from model and group; None if it does not."""
    if plan.ranks != ranks:
        return f"it is for {plan.ranks} ranks, and here are {ranks}"
    theirs, here = _parameters(plan.flats), _parameters(layout.flats)
    for name in theirs:
        if name not in here:
            return f"it sends parameter {name!r}, which is not trained here"
    for name in here:
        if name not in theirs:
            return f"it does not send parameter {name!r}, which is trained here"
    for name, there in theirs.items():
        if there != here[name]:
            return f"parameter {name!r} has {there} there, and {here[name]} here"
    rest = first_difference(
        [asdict(flat) for flat in plan.flats], [asdict(flat) for flat in layout.flats]
    )
    return f"its flat buffers differ at {rest} (there / here)" if rest else None


def _parameters(flats: tuple[Flat, ...]) -> dict[str, str]:
    """Size and dtype of each parameter in words, by name."""
    return {
        slot.name: f"{slot.numel} elements of {flat.dtype}" for flat in flats for slot in flat.slots
    }
