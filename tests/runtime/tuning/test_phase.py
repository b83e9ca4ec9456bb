"""The phases of tuning follow each other as they may, and a wrong one tells what came before."""

from __future__ import annotations

import itertools

import pytest

from soonest.runtime.tuning.candidates import Trial
from soonest.runtime.tuning.phase import Phase, PhaseHistory

LIFE = (Phase.OBSERVE, Phase.TRIALS, Phase.SETTLED, Phase.OBSERVE, Phase.TRIALS, Phase.SETTLED)
NEVER = [
    (Phase.WARM_UP, Phase.TRIALS),
    (Phase.OBSERVE, Phase.OBSERVE),
    (Phase.TRIALS, Phase.OBSERVE),
    (Phase.TRIALS, Phase.TRIALS),
    (Phase.SETTLED, Phase.TRIALS),
    (Phase.SETTLED, Phase.SETTLED),
]


def history_at(phase: Phase) -> PhaseHistory:
    history = PhaseHistory()
    for step, following in enumerate(LIFE):
        if history.phase is phase:
            break
        history.enter(following, step, "as usual")
    assert history.phase is phase
    return history


def test_a_training_goes_through_all_phases() -> None:
    history = PhaseHistory()
    assert history.phase is Phase.WARM_UP
    for step, phase in enumerate(LIFE):
        history.enter(phase, step, "as usual")
        assert history.phase is phase


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, Phase)))
def test_only_what_may_follow_is_entered(before: Phase, after: Phase) -> None:
    history = history_at(before)
    if (before, after) not in NEVER:
        history.enter(after, 9, "why not")
        assert history.phase is after
        return
    with pytest.raises(AssertionError, match=f"from {before.value!r} to {after.value!r}"):
        history.enter(after, 9, "why not")
    assert history.phase is before


def test_a_wrong_phase_tells_the_last_twenty_events() -> None:
    history = PhaseHistory()
    history.enter(Phase.OBSERVE, 1, "the order is known")
    history.enter(Phase.TRIALS, 5, "enough was seen")
    for number in range(19):
        history.note(6 + number, f"trial of candidate {number}")
    with pytest.raises(AssertionError) as told:
        history.enter(Phase.OBSERVE, 30, "for no reason")
    text = str(told.value)
    assert "after step 30 (for no reason), only to warm-up, settled" in text
    assert "step 5: observe → trials, enough was seen; step 6: trial of candidate 0; " in text
    assert text.endswith("step 24: trial of candidate 18")
    assert "the order is known" not in text, "the twenty-first"


def test_history_and_trial_show_themselves_in_one_line() -> None:
    history = PhaseHistory()
    assert repr(history) == "PhaseHistory(warm-up)"
    history.enter(Phase.OBSERVE, 1, "the order is known")
    assert repr(history) == (
        "PhaseHistory(observe, last: step 1: warm-up → observe, the order is known)"
    )
    assert repr(Trial("one bucket", (0.1, 0.2, 0.4))) == "Trial(one bucket, 200 ms a step)"
