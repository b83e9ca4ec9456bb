"""Who is late, judged by series that are made up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from soonest.runtime.timing import straggler
from soonest.runtime.timing.straggler import Sample, Straggler, late_ranks

RANKS, LOOK = 4, 10
FAST, SLOW = 200e6, 66e6
"""Rates of links, bits per second."""
NAMES = [f"rank {rank} (host h{rank}, process {rank})" for rank in range(9)]


def samples(
    own_s: Sequence[float] = (0.1,) * RANKS,
    *,
    step_s: float = 0.15,
    link: Callable[[int, int], float] = lambda source, target: FAST,
    ring: bool = False,
    backward_s: Sequence[float] | None = None,
) -> list[Sample]:
    """Of ranks with these times, and rates by sender and receiver; a ring only uses some links."""
    ranks = range(len(own_s))

    def bps(source: int, target: int) -> float:
        used = target == (source + 1) % len(ranks) if ring else target != source
        return link(source, target) if used else math.nan

    return [
        Sample(
            step_s,
            own_s[rank],
            backward_s[rank] if backward_s else own_s[rank] * 0.6,
            [bps(rank, target) for target in ranks],
        )
        for rank in ranks
    ]


def slow_link(*slow: int) -> Callable[[int, int], float]:
    return lambda source, target: SLOW if source in slow or target in slow else FAST


def named_by(series: Sequence[list[Sample]]) -> list[tuple[int, str, int] | None]:
    """After each look: rank, cause and since when."""
    straggler = Straggler()
    found: list[tuple[int, str, int] | None] = []
    for number, every in enumerate(series):
        before = straggler.named
        changed = straggler.look(1 + LOOK * number, every)
        late = straggler.named
        key = (before and (before.rank, before.cause), late and (late.rank, late.cause))
        assert changed == (key[0] != key[1])
        found.append((late.rank, late.cause, late.since) if late else None)
    return found


def by_one_look(every: list[Sample]) -> list[tuple[int, str]]:
    return [(late.rank, late.cause) for late in late_ranks(every)]


QUIET = samples()
SLOW_COMPUTE = samples((0.1, 0.1, 0.15, 0.1), step_s=0.2)
SLOW_LINK = samples(step_s=0.3, link=slow_link(1))


def test_slow_compute_is_named_after_three_looks_and_since_the_first() -> None:
    found = named_by([QUIET, *[SLOW_COMPUTE] * 4])
    assert found == [None, None, None, (2, "compute", 11), (2, "compute", 11)]


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("slow", range(RANKS))
def test_a_slow_link_is_named(slow: int, ring: bool) -> None:
    every = samples(step_s=0.3, link=slow_link(slow), ring=ring)
    assert named_by([every] * 3)[-1] == (slow, "link", 1)


@pytest.mark.parametrize("slow", range(RANKS))
def test_a_link_that_is_slow_in_one_direction_is_named(slow: int) -> None:
    sends = samples(step_s=0.3, link=lambda source, _: SLOW if source == slow else FAST)
    receives = samples(step_s=0.3, link=lambda _, target: SLOW if target == slow else FAST)
    assert by_one_look(sends) == by_one_look(receives) == [(slow, "link")]


def test_between_two_ranks_a_slow_link_is_nobodys() -> None:
    assert by_one_look(samples((0.1, 0.1), step_s=0.5, link=lambda a, b: SLOW * (1 + a))) == []


def test_of_two_ranks_the_slower_is_named() -> None:
    assert by_one_look(samples((0.1, 0.15))) == [(1, "compute")]


def test_what_costs_nothing_names_nobody() -> None:
    """Where steps do not wait for the network, a slow link is no matter."""
    assert by_one_look(samples(step_s=0.105, link=slow_link(1))) == []
    assert by_one_look(samples((0.001, 0.001, 0.002, 0.001), step_s=0.002)) == []
    assert by_one_look(samples((0.010, 0.010, 0.015, 0.010), step_s=0.4)) == []


def test_all_slow_alike_name_nobody() -> None:
    assert named_by([samples((0.5,) * RANKS, step_s=0.9, link=lambda *_: SLOW)] * 9) == [None] * 9


def test_of_two_that_are_slow_the_slowest_is_named_and_stays_so() -> None:
    worse = samples((0.1, 0.2, 0.15, 0.1), step_s=0.3)
    assert named_by([worse] * 3)[-1] == (1, "compute", 1)
    alike = [samples((0.1, 0.15 + x, 0.15, 0.1), step_s=0.3) for x in (0.001, -0.001) * 6]
    found = named_by(alike)
    assert found[:2] == [None, None]
    assert len(set(found[2:])) == 1, "not by turns"


def test_one_that_becomes_worse_takes_the_place_of_another() -> None:
    before = samples((0.1, 0.15, 0.1, 0.1), step_s=0.3)
    after = samples((0.1, 0.15, 0.1, 0.3), step_s=0.4)
    found = named_by([before] * 5 + [after] * 5)
    assert found[4] == (1, "compute", 1)
    assert found[-1] == (3, "compute", 51)


def test_slow_for_a_while_is_told_and_taken_back() -> None:
    found = named_by([QUIET] * 2 + [SLOW_LINK] * 5 + [QUIET] * 5)
    assert found[:4] == [None] * 4
    assert found[4:9] == [(1, "link", 21)] * 5, "two quiet looks are not yet an end"
    assert found[9:] == [None] * 3


def test_a_rank_that_was_slow_only_shortly_is_not_named() -> None:
    assert set(named_by([QUIET, SLOW_COMPUTE, SLOW_COMPUTE, QUIET] * 5)) == {None}


def test_a_changing_one_is_not_named() -> None:
    turns = [
        samples([0.2 if rank == n % RANKS else 0.1 for rank in range(RANKS)]) for n in range(40)
    ]
    assert set(named_by(turns)) == {None}


def test_where_the_loop_makes_ranks_wait_the_backward_pass_tells() -> None:
    backward_s = (0.05, 0.05, 0.05, 0.10)
    every = samples((0.2,) * RANKS, step_s=0.2, backward_s=backward_s)
    assert by_one_look(every) == [(3, "compute")]


@pytest.mark.parametrize("seed", range(20))
def test_noise_names_nobody_and_hides_nobody(seed: int) -> None:
    draw = random.Random(seed)

    def noisy(
        own_s: Sequence[float], link: Callable[[int, int], float], ring: bool
    ) -> list[Sample]:
        """A few percent each, and rarely a look in which something takes twice as long."""
        times = [own * draw.gauss(1, 0.05) * (2 if draw.random() < 0.01 else 1) for own in own_s]
        return samples(
            times,
            step_s=0.3 * draw.gauss(1, 0.05),
            link=lambda a, b: link(a, b) * draw.uniform(0.8, 1.2),
            ring=ring,
        )

    quiet = [noisy((0.15,) * RANKS, lambda *_: FAST, bool(seed % 2)) for _ in range(200)]
    assert set(named_by(quiet)) == {None}
    slow = [noisy((0.15, 0.15, 0.15, 0.25), lambda *_: FAST, bool(seed % 2)) for _ in range(20)]
    assert named_by(slow)[-1] == (3, "compute", named_by(slow)[-1][2])  # type: ignore[index]
    link = [noisy((0.15,) * RANKS, slow_link(0), bool(seed % 2)) for _ in range(20)]
    assert named_by(link)[-1] == (0, "link", 1)


def test_unknown_rates_name_nobody_and_hide_no_slow_compute() -> None:
    unknown: Any = lambda *_: math.nan  # noqa: E731
    assert by_one_look(samples((0.1, 0.1, 0.1, 0.2), link=unknown)) == [(3, "compute")]
    two = samples(step_s=0.3, link=lambda a, b: SLOW if {a, b} == {0, 1} else math.nan)
    assert by_one_look(two) == []


def test_numbers_go_round_as_they_are() -> None:
    (sample,) = samples((0.1,))
    assert Sample.from_numbers(sample.to_numbers())[:3] == sample[:3]


def test_it_is_told_in_words() -> None:
    straggler = Straggler()
    for number in range(3):
        straggler.look(21 + LOOK * number, SLOW_COMPUTE)
    assert straggler.named is not None
    assert straggler.named.told(NAMES) == (
        "rank 2 (host h2, process 2) is late since step 21: its compute takes 150 ms a step, that "
        "of the others 100 ms; this costs up to 50 ms of a step of 200 ms"
    )
    (late,) = late_ranks(SLOW_LINK)
    assert late.told(NAMES).endswith(
        "its link carries 66 Mbit/s, those of the others 200 Mbit/s; this costs up to 134 ms of a "
        "step of 300 ms"
    )


def test_a_rank_is_compared_with_the_median_of_all_but_itself() -> None:
    # For 1: 5, 9 and 100; for 5: 1, 9 and 100; for 9 and 100: 1, 5 and the other one.
    assert straggler._of_others([1.0, 5.0, 9.0, 100.0]) == [9.0, 9.0, 5.0, 5.0]
    # For 8: (1 + 3) / 2.
    assert straggler._of_others([8.0, 1.0, 3.0]) == [2.0, 5.5, 4.5]
    assert straggler._of_others([7.0, 4.0]) == [4.0, 7.0]
