"""When steps count as changed, by a clock that the tests move."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from soonest.runtime.tuning.drift import Drift


def compared(
    step_s: Callable[[int], float], *, plans: int = 0, steps: int = 4000
) -> list[tuple[int, float | None]]:
    """After which steps the ranks compare, and what the first one then says."""
    drift, now, found = Drift(plans=plans), 0.0, []
    for step in range(steps):
        now += step_s(step)
        if drift.ended(now):
            found.append((step + 1, drift.factor))
    return found


def test_ranks_compare_now_and_then() -> None:
    at = [step for step, _ in compared(lambda _: 1.0, steps=1500)]
    assert at == [128, 384, 640, 896, 1152, 1408]


def test_after_more_plans_they_wait_longer_at_first() -> None:
    first = [compared(lambda _: 1.0, plans=plans)[0][0] for plans in range(6)]
    assert first == [128, 256, 512, 1024, 1024, 1024]


def test_when_they_compare_does_not_depend_on_times() -> None:
    rng = random.Random(0)
    noisy, even = compared(lambda _: rng.random()), compared(lambda _: 1.0)
    assert [step for step, _ in noisy] == [step for step, _ in even]


@pytest.mark.parametrize("factor", [2.0, 1.3, 0.75, 0.5])
def test_steps_that_change_for_good_are_noticed_at_the_next_comparison(factor: float) -> None:
    found = compared(lambda step: factor if step >= 200 else 1.0)
    assert found[0] == (128, None)
    assert found[1] == (384, pytest.approx(factor))


def test_small_changes_are_not() -> None:
    assert all(f is None for _, f in compared(lambda step: 1.2 if step >= 200 else 1.0))
    assert all(f is None for _, f in compared(lambda step: 0.85 if step >= 200 else 1.0))


@pytest.mark.parametrize("seed", range(20))
def test_jitter_is_not(seed: int) -> None:
    rng = random.Random(seed)
    assert all(f is None for _, f in compared(lambda _: 1 + 0.3 * rng.random()))


def test_pauses_are_not() -> None:
    """Every third step is followed by an evaluation, from some time on."""
    found = compared(lambda step: 50.0 if step > 200 and step % 3 == 0 else 1.0)
    assert all(f is None for _, f in found)


def test_a_passing_disturbance_is_not() -> None:
    """It lasts for one window of steps, right before a comparison."""
    assert compared(lambda step: 3.0 if 350 <= step < 384 else 1.0)[1] == (384, None)
    assert compared(lambda step: 3.0 if 200 <= step < 300 else 1.0)[1] == (384, None)


def test_steps_that_are_off_in_turns_in_opposite_directions_are_not() -> None:
    """Slower for 32 steps, faster for the next 32: no change is there for good."""
    found = compared(lambda step: 1.0 if step < 160 else 2.0 if step // 32 % 2 else 0.5)
    assert len(found) > 10
    assert all(f is None for _, f in found)
