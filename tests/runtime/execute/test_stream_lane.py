"""The race detector finds what is not ordered, and nothing else."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.race import FakeStreams, watched

STREAMS, BUFFERS = 3, 2


def run(program: list[tuple[str, int, int]], *, whole: bool = True) -> list[str]:
    """Races of a program: ("read" or "write", stream, buffer), or ("wait", stream, other)."""
    streams = FakeStreams()
    named = [streams.main, *(streams.stream(f"s{i}") for i in range(1, STREAMS))]
    buffers = [torch.zeros(8) for _ in range(BUFFERS)]
    with watched(streams, *buffers):
        for stream in named[1:]:
            streams.follow(stream, streams.main)
        for what, stream, other in program:
            with streams.use(named[stream]):
                if what == "wait":
                    streams.follow(named[stream], named[other % STREAMS])
                elif what == "write":
                    buffers[other % BUFFERS].add_(1)
                else:
                    buffers[other % BUFFERS].sum()
    return streams.detector.races


def expected(program: list[tuple[str, int, int]]) -> bool:
    """The same by definition: some conflicting pair has no path of program order and waits."""
    behind: list[set[int]] = []  # per action, all actions that come before it
    last: dict[int, int] = {}
    for index, (what, stream, other) in enumerate(program):
        before: set[int] = set()
        if stream in last:
            before |= behind[last[stream]] | {last[stream]}
        if what == "wait" and other % STREAMS in last:
            there = last[other % STREAMS]
            before |= behind[there] | {there}
        behind.append(before)
        last[stream] = index
    touching = [
        (index, what, other % BUFFERS)
        for index, (what, _, other) in enumerate(program)
        if what != "wait"
    ]
    return any(
        first not in behind[second]
        for first, how, buffer in touching
        for second, then, same in touching
        if first < second and buffer == same and "write" in (how, then)
    )


actions = st.tuples(
    st.sampled_from(["read", "write", "wait", "wait"]),
    st.integers(0, STREAMS - 1),
    st.integers(0, STREAMS - 1),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(actions, max_size=14))
def test_a_race_is_found_if_and_only_if_there_is_one(program: list[Any]) -> None:
    assert bool(run(program)) == expected(program)


def test_parts_of_a_buffer_are_told_apart() -> None:
    streams = FakeStreams()
    side, buffer = streams.stream("side"), torch.zeros(8)
    with watched(streams, buffer):
        buffer[:4].add_(1)
        with streams.use(side):
            buffer[4:].add_(1)
        assert len(streams.detector.races) == 1  # behind the start: nobody said so
        streams.detector.races.clear()
        with streams.use(side):
            buffer.view(2, 4)[0].mul_(2)
    (found,) = streams.detector.races
    assert found == "mul_ on side is not ordered behind add_ on main"


def test_the_host_orders_what_it_has_seen() -> None:
    streams = FakeStreams(patience=2)
    side, buffer = streams.stream("side"), torch.zeros(8)
    with watched(streams, buffer):
        event = streams.record(streams.main)
        assert [event.query(), event.query(), event.query()] == [False, False, True]
        with streams.use(side):
            assert buffer.sum().item() == 0
            buffer.add_(1)
        assert streams.detector.races == []
        buffer.add_(1)
    assert len(streams.detector.races) == 1
    assert streams.detector.host_waits == ["_local_scalar_dense"]


@pytest.mark.parametrize("cure", ["none", "keep", "wait"])
def test_memory_that_is_freed_too_early(cure: str) -> None:
    streams = FakeStreams()
    lane, out = streams.make(), torch.zeros(8)
    with watched(streams, out):
        streams.follow(lane, streams.main)
        temporary = torch.ones(8)
        streams.follow(lane, streams.main)
        with streams.use(lane):
            out += temporary
        if cure == "keep":
            streams.keep(temporary, lane)
        if cure == "wait":
            streams.follow(streams.main, lane)
        del temporary
        torch.ones(3).add_(1)
    found = streams.detector.races
    assert found == [] if cure != "none" else "which add_ on lane" in found[0]


def test_a_wait_can_be_left_out() -> None:
    buffer = torch.zeros(8)
    for without, races in ((), 0), ((0,), 1):
        streams = FakeStreams(without=without)
        side = streams.stream("side")
        with watched(streams, buffer):
            streams.wait(side, streams.record(streams.main))
            with streams.use(side):
                buffer.add_(1)
        assert len(streams.detector.races) == races


def test_random_programs_have_races_and_have_none() -> None:
    """What hypothesis draws above is of both kinds."""
    random, found = Random(0), []
    for _ in range(40):
        program = [
            (
                random.choice(["read", "write", "wait", "wait"]),
                random.randrange(STREAMS),
                random.randrange(STREAMS),
            )
            for _ in range(6)
        ]
        found.append(bool(run(program)))
    assert 5 < sum(found) < 35
