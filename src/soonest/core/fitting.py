"""Turns measured times of one kind of op into a curve that costs can be read from.

Measurements on a network are noisy and one-sided: now and then one takes many times as long. So
medians are taken per size, far outliers are left out, and a larger bucket never gets cheaper than a
smaller one, which a planner would otherwise exploit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

TINY_S = 1e-9
"""Shorter times than this are taken for rounding."""
_OUTLIER = 5.0
"""Median deviations from the median beyond which a time is no measurement of the network."""


class Fitted(NamedTuple):
    """The fields of a ``Cost``, in its order."""

    sizes_bytes: tuple[float, ...]
    seconds: tuple[float, ...]
    latency_s: float
    error: float
    hidden_s: tuple[float, ...]


def fitted(
    samples: Iterable[tuple[float, float]], spaced_s: Mapping[float, float] | None
) -> Fitted:
    """Fits measured times: medians per size, outliers dropped, made never falling.

    Args:
        samples: ``(size_bytes, seconds)``, at least one, in any order, sizes repeated at will.
        spaced_s: see ``Cost.fit``.

    Raises:
        ValueError: there are no samples.
    """
    by_size: defaultdict[float, list[float]] = defaultdict(list)
    for size, seconds in samples:
        by_size[float(size)].append(max(seconds, TINY_S))
    if not by_size:
        raise ValueError("a cost cannot be fitted to no samples: measure at least one size")
    sizes: tuple[float, ...] = tuple(sorted(by_size))
    kept = [_without_outliers(by_size[size]) for size in sizes]
    seconds = _never_falling([median(times) for times in kept])
    spread = [_deviation(times) / median(times) for times in kept if len(times) > 1] or [0.0]
    if not spaced_s:
        latency_s = min(max(0.0, _at_nothing(sizes, seconds)), seconds[0])
        return Fitted(sizes, tuple(seconds), latency_s, median(spread), ())
    # What single ops get through at once, links with some room for more do not carry for long.
    seconds = _never_falling(
        [max(t, spaced_s.get(size, 0.0)) for size, t in zip(sizes, seconds, strict=True)]
    )
    hidden_s = _hidden(sizes, seconds, spaced_s)
    return Fitted(sizes, tuple(seconds), hidden_s[0], median(spread), hidden_s)


def _hidden(
    sizes: Sequence[float], seconds: Sequence[float], spaced_s: Mapping[float, float]
) -> tuple[float, ...]:
    """What of each time passes while another op transfers, where both parts never fall."""
    found_s = [
        t - spaced_s[size] for size, t in zip(sizes, seconds, strict=True) if size in spaced_s
    ]
    hidden_s: list[float] = []
    rising = iter(_never_falling(found_s))
    for size, second in zip(sizes, seconds, strict=True):
        before_s = hidden_s[-1] if hidden_s else 0.0
        most_s = before_s + second - (seconds[len(hidden_s) - 1] if hidden_s else 0.0)
        here_s = next(rising) if size in spaced_s else before_s
        hidden_s.append(min(max(before_s, here_s), most_s))
    return tuple(hidden_s)


def _at_nothing(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Where the line through the two smallest sizes meets no size at all."""
    if len(sizes) == 1:
        return seconds[0]
    (s0, s1), (t0, t1) = sizes[:2], seconds[:2]
    return t0 - s0 * (t1 - t0) / (s1 - s0)


def _without_outliers(values: Sequence[float]) -> list[float]:
    middle, deviation = median(values), _deviation(values)
    near = [v for v in values if abs(v - middle) <= _OUTLIER * max(deviation, TINY_S)]
    return near or list(values)


def _deviation(values: Sequence[float]) -> float:
    """Median deviation from the median."""
    middle = median(values)
    return median(abs(value - middle) for value in values)


def _never_falling(values: Sequence[float]) -> list[float]:
    """Replaces falling values by their mean: isotonic regression by pooling adjacent violators.

    See M. Ayer et al., "An empirical distribution function for sampling with incomplete
    information", Ann. Math. Statist. 26, 1955.
    """
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, many = blocks.pop()
            mean = (mean * count + before * many) / (count + many)
            count += many
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]
