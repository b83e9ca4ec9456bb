"""Judges which rank the others wait for, and why, by what all ranks measured of the same steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal, NamedTuple

import numpy as np

from soonest.core.units import rate_text

Cause = Literal["compute", "link"]

_ROUNDS = 3
"""Looks in a row after which a rank counts as late, and after which it no longer does."""
_COMPUTE, _LINK = 1.2, 1.5
"""Factors by which a late rank's compute, or its bytes, take longer than the others'. The rates of
links are known less well."""
_FRACTION, _LEAST_S = 0.1, 2e-3
"""What a late rank must cost, a fraction of the step and seconds, to be worth a warning."""
_WORSE = 1.25
"""Factor by which another late rank must cost more to be named: two alike would alternate."""
_COMPARED = 3
"""Fewest ranks with which a slow link can be told: each connection has two ends."""


class Sample(NamedTuple):
    """What one rank measured over a few steps.

    Args:
        step_s: from the end of one backward pass to the end of the next, seconds.
        own_s: of it, the time in which the rank waited for no other: computing, reading data,
            updating parameters.
        backward_s: the same of the backward pass, from its first gradient on.
        sent_bps: by rank, bits per second at which what was sent there went; NaN where not known.
    """

    step_s: float
    own_s: float
    backward_s: float
    sent_bps: Sequence[float]

    def to_numbers(self) -> list[float]:
        """The sample as numbers, as many on every rank."""
        return [self.step_s, self.own_s, self.backward_s, *self.sent_bps]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Sample:
        step_s, own_s, backward_s, *sent_bps = numbers
        return cls(step_s, own_s, backward_s, sent_bps)


@dataclass(frozen=True)
class Late:
    """A rank for which the others wait, and why.

    Args:
        rank: which.
        cause: what is slow there.
        its, others: seconds of compute in a step, or bits per second of the link: the rank's own,
            and the median of the others.
        costs_s: by how much a step is longer for it, seconds, at most: some of it may be hidden.
        step_s: how long a step takes.
        since: the first step for which it is known.
    """

    rank: int
    cause: Cause
    its: float
    others: float
    costs_s: float
    step_s: float
    since: int = 0

    def told(self, names: Sequence[str]) -> str:
        """Says it in a sentence.

        Args:
            names: of all ranks.
        """
        if self.cause == "compute":
            mine, theirs = f"{self.its * 1e3:.3g} ms", f"{self.others * 1e3:.3g} ms"
            why = f"its compute takes {mine} a step, that of the others {theirs}"
        else:
            mine, theirs = rate_text(self.its), rate_text(self.others)
            why = f"its link carries {mine}, those of the others {theirs}"
        return (
            f"{names[self.rank]} is late since step {self.since}: {why}; this costs up to "
            f"{self.costs_s * 1e3:.3g} ms of a step of {self.step_s * 1e3:.3g} ms"
        )


class Straggler:
    """Follows over time which rank is late, so that a single slow step names none.

    All ranks look at the same samples, so all name the same rank.

    Attributes:
        named: the rank that costs most, if any has been late for some time.
    """

    def __init__(self) -> None:
        self.named: Late | None = None
        self._spells: dict[tuple[int, Cause], _Spell] = {}

    def look(self, first_step: int, samples: Sequence[Sample]) -> bool:
        """Takes note of some more steps.

        Args:
            first_step: the number of the first of them.
            samples: of them, by rank.

        Returns:
            Whether another rank or cause is named than before, or none any more.
        """
        found: dict[tuple[int, Cause], Late] = {
            (late.rank, late.cause): late for late in late_ranks(samples)
        }
        for key, late in found.items():
            spell = self._spells.setdefault(key, _Spell(first_step, late))
            spell.seen, spell.missed, spell.latest = spell.seen + 1, 0, late
        for key, spell in list(self._spells.items()):
            spell.missed += key not in found
            if spell.missed >= (_ROUNDS if spell.lasts else 1):
                del self._spells[key]
        before, self.named = self.named, self._worst()
        return _key(before) != _key(self.named)

    def _worst(self) -> Late | None:
        lasting = {key: spell for key, spell in self._spells.items() if spell.lasts}
        worst = max(lasting.values(), key=lambda spell: spell.latest.costs_s, default=None)
        now = lasting.get(_key(self.named)) if self.named else None
        if worst and now and worst.latest.costs_s <= _WORSE * now.latest.costs_s:
            worst = now
        return replace(worst.latest, since=worst.since) if worst else None


@dataclass
class _Spell:
    """A period in which one rank is late for one cause.

    Args:
        since: its first step.
        latest: how late it was when last seen.
        seen: how often that was.
        missed: how often in a row it was not late any more.
    """

    since: int
    latest: Late
    seen: int = 0
    missed: int = 0

    @property
    def lasts(self) -> bool:
        return self.seen >= _ROUNDS


def _key(late: Late | None) -> tuple[int, Cause]:
    return (late.rank, late.cause) if late else (-1, "compute")


def late_ranks(samples: Sequence[Sample]) -> list[Late]:
    """The ranks that are late in one look, each for each cause at most once."""
    return [*_slow_compute(samples), *_slow_links(samples)]


def _slow_compute(samples: Sequence[Sample]) -> Iterator[Late]:
    """Finds ranks whose compute takes longer than the others'.

    Where the loop itself makes ranks wait for each other, as by a barrier, own times are alike; the
    backward passes still show who is slow.
    """
    step_s = median(sample.step_s for sample in samples)
    own_s = [sample.own_s for sample in samples]
    backward_s = [sample.backward_s for sample in samples]
    if all(max(times) <= _COMPUTE * min(times) for times in (own_s, backward_s)):
        return  # as almost always, which should cost nothing
    spans = [(times, _of_others(times)) for times in (own_s, backward_s)]
    for rank in range(len(samples)):
        its, others = max(
            ((times[rank], medians[rank]) for times, medians in spans),
            key=lambda pair: pair[0] - pair[1],
        )
        if its > _COMPUTE * others and _matters(its - others, step_s):
            yield Late(rank, "compute", its, others, its - others, step_s)


def _slow_links(samples: Sequence[Sample]) -> list[Late]:
    """Finds ranks whose bytes go slower than the others', while steps wait for the network.

    A connection is as fast as the slower of its ends. So a rank's link is as fast as the fastest
    connection to or from it; only where all are, one direction may still be slow.
    """
    if len(samples) < _COMPARED:
        return []
    step_s = median(sample.step_s for sample in samples)
    waits_s = median(max(0.0, sample.step_s - sample.own_s) for sample in samples)
    if not _matters(waits_s, step_s):
        return []
    rates = np.array([sample.sent_bps for sample in samples])
    sends, receives = np.fmax.reduce(rates, axis=1), np.fmax.reduce(rates, axis=0)
    for carries in (np.fmax(sends, receives), sends, receives):
        known = [rank for rank, bps in enumerate(carries) if not math.isnan(bps)]
        if len(known) < _COMPARED:
            continue
        bps = [float(carries[rank]) for rank in known]
        found = [
            Late(rank, "link", its, others, waits_s * (1 - its / others), step_s)
            for rank, its, others in zip(known, bps, _of_others(bps), strict=True)
            if its * _LINK < others and _matters(waits_s * (1 - its / others), step_s)
        ]
        if found:
            return found
    return []


def _matters(costs_s: float, step_s: float) -> bool:
    return costs_s > max(_LEAST_S, _FRACTION * step_s)


def _of_others(values: Sequence[float]) -> list[float]:
    """For each of two values or more, the median of all but it."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranked = [values[index] for index in order]
    medians = [0.0] * len(values)
    lower, upper = (len(values) - 2) // 2, (len(values) - 1) // 2
    for place, index in enumerate(order):
        pair = (ranked[at + (at >= place)] for at in (lower, upper))
        medians[index] = sum(pair) / 2
    return medians
