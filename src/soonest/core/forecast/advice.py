"""What limits a predicted step, and which change would help most: in words, with figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from soonest.core.forecast.predict import ARMS, SOONEST, TUNED, Row, Scenario, row_of, slowed

_WORTH = 0.01
"""Gains below this fraction are not told: predictions are not more exact than that."""
_RIVALS = tuple(arm for arm in ARMS if arm not in ("sequential", SOONEST))


@dataclass(frozen=True)
class Change:
    """Something that could be changed.

    Args:
        name: what, in a few words.
        gain: how many times as many samples per second soonest would then train.
    """

    name: str
    gain: float


@dataclass(frozen=True)
class Advice:
    """What follows from a prediction.

    Args:
        hosts: for how many.
        limit: ``compute``, ``bandwidth`` or ``latency``.
        changes: the one that helps most first.
        words: all of it in sentences.
    """

    hosts: int
    limit: str
    changes: tuple[Change, ...]
    words: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def advise(scenario: Scenario, rows: Sequence[Row]) -> Advice:
    """What limits soonest on the most hosts predicted, and what would help.

    What limits is that of computing speed, rate of the links and latency whose doubling or halving
    would shorten the step most. Everything is predicted again, with a new plan.

    Args:
        scenario: what is trained on what.
        rows: what has been predicted, at least one.
    """
    row = max(rows, key=lambda row: row.hosts)
    changes = _changes(scenario, row)
    limit = _limit(scenario, row)
    words = [_what_limits(row, limit), *_what_helps(changes, row), *_what_it_gains(rows)]
    return Advice(row.hosts, limit, changes, tuple(words))


def _step_s(scenario: Scenario, hosts: int) -> float:
    return row_of(scenario, hosts, (SOONEST,)).step_s[SOONEST]


def _limit(scenario: Scenario, row: Row) -> str:
    if row.hosts == 1:
        return "compute"
    fabric = scenario.fabric
    eased = {
        "compute": replace(scenario, trace=slowed(scenario.trace, 0.5)),
        "bandwidth": replace(scenario, fabric=fabric.faster(2.0)),
        "latency": replace(scenario, fabric=fabric.with_latency(0.5)),
    }
    step_s = {name: _step_s(other, row.hosts) for name, other in eased.items()}
    return min(step_s, key=step_s.__getitem__)


def _changes(scenario: Scenario, row: Row) -> tuple[Change, ...]:
    """Each change to be had, by what it gains."""
    fabric, step_s = scenario.fabric, row.step_s[SOONEST]
    found: list[Change] = []
    if row.hosts > 1:
        tried = {
            "links twice as fast": replace(scenario, fabric=fabric.faster(2.0)),
            "no latency at all": replace(scenario, fabric=fabric.with_latency(0.0)),
        }
        if scenario.wire == "float32":
            tried["gradients in 16 bits"] = replace(scenario, wire="bfloat16")
        found += [Change(name, step_s / _step_s(s, row.hosts)) for name, s in tried.items()]
        found.append(Change("twice the batch", 2 * step_s / _step_s(_doubled(scenario), row.hosts)))
    return tuple(sorted(found, key=lambda change: -change.gain))


def _doubled(scenario: Scenario) -> Scenario:
    """With twice as many samples a step."""
    if scenario.global_batch is not None:
        return replace(scenario, global_batch=2 * scenario.global_batch)
    return replace(scenario, trace=slowed(scenario.trace, 2.0))


def _what_limits(row: Row, limit: str) -> str:
    where = f"On {gpus_text(row.gpus)}"
    compute_ms, step_ms = row.compute_s * 1e3, row.step_s[SOONEST] * 1e3
    if row.hosts == 1:
        return f"{where} nothing goes over the network: computing takes {_ms(step_ms)}."
    told = (
        f"computing takes {_ms(compute_ms)}, synchronizing all gradients "
        f"{_ms(row.sync_s * 1e3)}, and a step with soonest {_ms(step_ms)}, "
        f"{step_ms / (row.bound_s * 1e3):.2f} times what no schedule can beat"
    )
    what = {
        "compute": "computing limits the step: most of what is sent hides behind it",
        "bandwidth": "the rate of the links limits the step",
        "latency": "the latency of messages limits the step, not the rate of the links",
    }[limit]
    return f"{where} {what}; {told}."


def _what_helps(changes: Sequence[Change], row: Row) -> list[str]:
    if not changes:
        return []
    best = changes[0]
    others = ", ".join(f"{c.name} {c.gain:.2f}" for c in changes[1:])
    if best.gain < 1 + _WORTH:
        what = ", ".join(change.name for change in changes)
        return [
            f"None of these would help by a percent: {what}. Only faster GPUs would, or more of "
            "them."
        ]
    return [
        f"What would help most: {best.name}, for {best.gain:.2f} times as many samples per second. "
        f"The others: {others}."
    ]


def _what_it_gains(rows: Sequence[Row]) -> list[str]:
    """Where soonest is worth having over the best of its peers, and where not."""
    many = [row for row in rows if row.hosts > 1]
    if not many:
        return []
    gains = {row.gpus: _gain(row) for row in many}
    least, most = min(gains.values()), max(gains.values())
    worth = [gpus for gpus, gain in gains.items() if gain >= 1 + _WORTH]
    if not worth:
        last = many[-1]
        why = (
            "synchronizing hides behind the backward pass with it as well"
            if last.sync_s < last.compute_s
            else "synchronizing takes far longer than computing, and only fewer bytes, faster "
            "links or a larger batch help"
        )
        return [f"soonest gains nothing over the best of its peers ({_best(last)}) here: {why}."]
    at = max(gains, key=gains.__getitem__)
    row = next(row for row in many if row.gpus == at)
    told = (
        f"soonest gains most over the best of its peers on {gpus_text(at)}: {most:.2f} times as "
        f"fast as {_best(row)}"
    )
    if len(worth) < len(gains):
        nothing = [gpus for gpus in gains if gpus not in worth]
        told += f"; it gains nothing on {listed(nothing)}"
    elif len(gains) > 1:
        told += f"; everywhere at least {least:.2f} times"
    return [f"{told}."]


def _best(row: Row) -> str:
    return min(_RIVALS, key=lambda arm: (row.step_s[arm], arm != TUNED))


def _gain(row: Row) -> float:
    return row.step_s[_best(row)] / row.step_s[SOONEST]


def gpus_text(gpus: int) -> str:
    """So many GPUs, in words."""
    return f"{gpus} GPU{'s' * (gpus > 1)}"


def listed(numbers: Sequence[int]) -> str:
    """Numbers in words, such as ``2, 4 and 8 GPUs``."""
    *head, last = map(str, numbers)
    return f"{', '.join(head)} and {last} GPUs" if head else gpus_text(numbers[0])


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"
