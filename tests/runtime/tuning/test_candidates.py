"""Which plans take trials, and which stays: decided from times that are told."""

from __future__ import annotations

import pytest

from helpers.ranks import mixed_network
from soonest.core.plan import Bucket, Flat
from soonest.core.trace import Layer, Trace
from soonest.runtime.tuning.candidates import (
    CANDIDATES,
    LIKE_DDP,
    SEARCHED,
    Candidate,
    Trial,
    distinct,
    next_trial,
    of_equal_numbers,
    reason_for,
    trials_of,
    with_searched,
)

USUAL, _, _, REDUCED, COARSE, TWO, ONE = CANDIDATES


def played(step_s: dict[Candidate, float]) -> tuple[list[Trial], Candidate]:
    """All trials, where steps under each candidate always take as long, and who stays."""
    trials: list[Trial] = []
    while True:
        candidate, stays = next_trial(trials, CANDIDATES)
        if stays:
            return trials, candidate
        trials.append(Trial(candidate.name, (step_s[candidate],) * 3))
        assert len(trials) < 30, "it comes to an end"


def times(**other_s: float) -> dict[Candidate, float]:
    names = ("usual", "ddp", "searched", "reduced", "coarse", "two", "one")
    named = dict(zip(names, CANDIDATES, strict=True))
    return {candidate: other_s.get(name, 2.0) for name, candidate in named.items()}


@pytest.mark.parametrize(("coarse_s", "more"), [(1.2, 1), (1.05, 2)])
def test_every_candidate_is_tried_and_those_near_the_fastest_again(
    coarse_s: float, more: int
) -> None:
    trials, stays = played(times(usual=1.0, coarse=coarse_s))
    every = len(CANDIDATES)
    assert [trial.name for trial in trials[:every]] == [candidate.name for candidate in CANDIDATES]
    assert [trial.name for trial in trials[every:]] == [USUAL.name, COARSE.name] * more
    assert stays is USUAL


def test_none_is_tried_again_if_none_is_near() -> None:
    trials, stays = played(times(ddp=1.0))
    assert len(trials) == len(CANDIDATES)
    assert stays is LIKE_DDP


def test_settling_takes_tens_of_steps_at_most() -> None:
    all_alike = dict.fromkeys(("usual", "ddp", "searched", "reduced", "coarse", "two", "one"), 1.0)
    assert len(played(times(**all_alike))[0]) == 21


@pytest.mark.parametrize(
    ("step_s", "stays"),
    [
        ({"usual": 1.0, "ddp": 0.999}, LIKE_DDP),
        ({"usual": 1.0, "ddp": 1.001}, USUAL),
        ({"usual": 1.0, "one": 0.97}, ONE),
        ({"usual": 1.0, "searched": 0.999}, SEARCHED),
        ({"usual": 1.0, "one": 0.99}, USUAL),
        ({"usual": 1.0, "one": 0.985, "ddp": 0.99}, LIKE_DDP),
        ({"usual": 1.0, "one": 0.95, "ddp": 0.99}, ONE),
        ({"usual": 1.5, "coarse": 1.0, "two": 1.0}, COARSE),
        ({"usual": 1.0, "reduced": 0.99}, REDUCED),
    ],
)
def test_the_fastest_stays_and_a_coarser_cut_only_if_clearly_so(
    step_s: dict[str, float], stays: Candidate
) -> None:
    assert played(times(**step_s))[1] is stays


@pytest.mark.parametrize("ddp_s", [0.8, 0.95, 0.985, 0.999, 1.0])
@pytest.mark.parametrize("coarse_s", [0.9, 0.97, 0.985, 1.0])
def test_what_stays_is_never_slower_than_what_ddp_does(ddp_s: float, coarse_s: float) -> None:
    step_s = times(usual=1.0, ddp=ddp_s, coarse=coarse_s)
    assert step_s[played(step_s)[1]] <= ddp_s


def test_single_slow_steps_do_not_decide() -> None:
    trials = [Trial(c.name, (3.0,)) for c in CANDIDATES[2:]]
    trials += [Trial(USUAL.name, (1.0, 1.0, 5.0))] * 3 + [Trial(LIKE_DDP.name, (1.1,) * 3)] * 3
    assert next_trial(trials, CANDIDATES) == (USUAL, True)


def test_a_single_fast_step_does_not_decide() -> None:
    trials = [Trial(candidate.name, (1.5, 1.5, 1.5)) for candidate in CANDIDATES]
    trials[0] = Trial(USUAL.name, (1.0, 2.0, 2.0))
    assert next_trial(trials, CANDIDATES) == (USUAL, False)
    for _ in range(2):
        trials += [Trial(USUAL.name, (2.0, 2.0, 2.0))]
        trials += [Trial(candidate.name, (1.5, 1.5, 1.5)) for candidate in CANDIDATES[1:]]
    assert next_trial(trials, CANDIDATES) == (LIKE_DDP, True)


def test_candidates_of_equal_buckets_are_one() -> None:
    flat = Flat.lay_out("float32", 4, [("a", "a", 20), ("b", "b", 20)])
    network = mixed_network(2)
    cuts = {
        c: c.bucketing([flat], network, ranks=2, methods=["allreduce"])
        for c in CANDIDATES
        if c != SEARCHED
    }
    distinct_ones = distinct(CANDIDATES, cuts)
    assert distinct_ones == (USUAL, LIKE_DDP, SEARCHED), "one bucket, overlapped or waited for"
    plan = USUAL.plan(
        Trace("t", (Layer("a", 80, 1, 1), Layer("b", 80, 1, 1))),
        [flat],
        network,
        ranks=2,
        window=3,
        methods=["allreduce"],
        pace=1.0,
    )
    assert with_searched(distinct_ones, None) == (USUAL, LIKE_DDP)
    *others, searched = with_searched(distinct_ones, plan)
    assert others == [USUAL, LIKE_DDP]
    assert searched.name == SEARCHED.name
    assert searched.found is plan


def test_the_same_numbers_come_of_the_same_cut_only() -> None:
    flat = Flat.lay_out("float32", 4, [("a", "a", 20)])
    buckets = (Bucket(0, 0, 32, "gather", ("a",)),)
    for candidate in (USUAL, COARSE, LIKE_DDP, SEARCHED):
        overlapping, waiting = of_equal_numbers(candidate, buckets)
        assert (overlapping.blocking, waiting.blocking) == (False, True)
        for one in (overlapping, waiting):
            cut = one.bucketing([flat], mixed_network(2), ranks=2, methods=["allreduce"])
            assert cut == buckets
    assert of_equal_numbers(waiting, buckets) == (overlapping, waiting)


def test_it_is_told_why() -> None:
    trials = [Trial(USUAL.name, (0.4, 0.41, 0.42)), Trial(LIKE_DDP.name, (0.5,))]
    assert reason_for(USUAL, trials) == (
        "the usual cut takes 410 ms a step (DDP's buckets, waiting in step() 500 ms)"
    )


def test_trials_survive_json() -> None:
    trials = [Trial("a", (1.0, 2.0)), Trial("b", (3.0,))]
    assert trials_of([["a", [1.0, 2.0]], ["b", [3.0]]]) == trials


@pytest.mark.parametrize("broken", [None, {"a": 1}, [["a"]], [["a", ["x"]]], [["a", []]], 3])
def test_trials_that_cannot_be_read_are_none(broken: object) -> None:
    assert trials_of(broken) == []


def test_all_reduce_alone_is_tried_where_others_were_chosen() -> None:
    flat = Flat.lay_out("float32", 4, [(f"{i}.weight", str(i), 1 << 15) for i in range(8)])
    network = mixed_network(4)

    def cuts(methods: list[str]) -> dict[Candidate, tuple[Bucket, ...]]:
        return {c: c.bucketing([flat], network, ranks=4, methods=methods) for c in CANDIDATES}

    mixed = cuts(["allreduce", "exchange"])
    assert {bucket.method for bucket in mixed[USUAL]} == {"allreduce", "exchange"}
    assert {bucket.method for bucket in mixed[REDUCED]} == {"allreduce"}
    assert REDUCED in distinct(CANDIDATES, mixed)
    asked = cuts(["exchange"])
    assert {bucket.method for bucket in asked[REDUCED]} == {"exchange"}
    assert REDUCED not in distinct(CANDIDATES, asked)
