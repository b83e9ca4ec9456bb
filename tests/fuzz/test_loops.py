"""Random training loops come out as under DistributedDataParallel, or with a sentence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuzz.arms import ARMS, OWN_BUFFERS
from fuzz.found import FOUND
from fuzz.loops import ACTIONS, Line, Loop, draw
from fuzz.pair import BAD, DIFFERENT, Pair
from fuzz.shrink import shrink

SEEDS = range(30)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


def wrong(loop: Loop, pair: Pair) -> dict[str, str]:
    """The ways in which a loop comes out wrong."""
    return {
        arm: f"{outcome.kind} at {outcome.at}: {outcome.text}"
        for arm, outcome in pair.train(loop, ARMS).items()
        if outcome.kind in BAD
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loop_comes_out_as_under_ddp(seed: int, pair: Pair) -> None:
    loop = draw(seed)
    said = f"python benchmarks/fuzz_loops.py --replay {seed} shortens it:\n{loop}"
    assert not wrong(loop, pair), said


@pytest.mark.parametrize("name", FOUND)
def test_what_was_once_different_is_not_any_more(name: str, pair: Pair) -> None:
    assert not wrong(FOUND[name], pair)


def test_what_differs_is_found_and_shortened(pair: Pair) -> None:
    """Where each rank has BatchNorm's statistics to itself, one pass is enough to see it."""
    one_step = (
        Line("zero", (("how", "none"),)),
        Line("one_pass", (("task", 1), ("by_rank", False), ("autocast", False))),
        Line("clip", (("norm", 1.0), ("by", "norm"))),
        Line("step", (("how", "plain"),)),
        Line("look", (("first", "kept"),)),
    )
    loop = Loop(3, "normed", "adamw", one_step * 3, groups="two", scheduler="step")
    small, outcome = shrink(pair, loop, OWN_BUFFERS)
    assert outcome.kind == DIFFERENT
    assert "buffers.norm.running_mean" in outcome.text
    assert {line.name for line in small.lines} == {"one_pass", "look"}
    assert len(small.lines) <= 3
    assert (small.optimizer, small.groups, small.scheduler) == ("sgd", "one", None)


def test_a_seed_stands_for_one_loop() -> None:
    assert [draw(seed) for seed in range(50)] == [draw(seed) for seed in range(50)]
    assert len({str(draw(seed)) for seed in range(50)}) == 50


def test_every_action_is_drawn_with_every_argument() -> None:
    drawn = {
        (line.name, key, value)
        for seed in range(2000)
        for line in draw(seed).lines
        for key, value in line.arguments
    }
    for name, one in ACTIONS.items():
        for key, values in one.choices.items():
            assert {(name, key, value) for value in values} <= drawn
