"""Both lanes do the same: what training reads, and what they say when something is wrong."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import worlds
from helpers.fake_ranks import FakeGroup, Meeting, as_threads
from helpers.race import FakeStreams, watched
from helpers.worlds import LANES, Loop, Soonest, adamw, fused, plainly, same, with_lane
from soonest.errors import PeerLostError, ReadTooEarlyError, SoonestError
from soonest.runtime.engine.module_buffers import Buffers
from soonest.runtime.execute.stream_lane import StreamLane

LOOPS: dict[str, Loop] = {
    "plain": Loop(),
    "another plan": Loop(seed=1, optimizer=adamw),
    "a third plan": Loop(seed=2),
    "sharded": Loop(sharded=True, seed=3),
    "sharded, another plan": Loop(sharded=True, seed=4, optimizer=adamw),
    "sharded, clipped": Loop(sharded=True, clip=True, seed=5),
    "sharded, gradients read": Loop(sharded=True, log="main", seed=6),
    "several backward passes": Loop(backwards=2, seed=7),
    "accumulated": Loop(accumulate=2, seed=8),
    "gradients thrown away": Loop(discard=True, seed=28),
    "sharded, gradients thrown away": Loop(sharded=True, discard=True, seed=29),
    "a branch by rank": Loop(spare=lambda step, rank: (step + rank) % 2 == 0, seed=9),
    "a branch never taken": Loop(spare=lambda step, rank: False, optimizer=adamw, seed=10),
    "sharded, a branch that nobody took": Loop(
        spare=lambda step, rank: step == 0, sharded=True, steps=2, log="side", seed=5693
    ),
    "zeroed before": Loop(zero="zero before", steps=4, seed=11),
    "zeroed after": Loop(zero="zero after", steps=4, seed=12),
    "zeroed after, momentum of zero": Loop(zero="zero after", extra=True, seed=13),
    "cleared after": Loop(zero="none after", seed=14),
    "sharded, zeroed after": Loop(zero="zero after", sharded=True, steps=4, seed=15),
    "clipped": Loop(clip=True, seed=16),
    "gradients read": Loop(log="main", seed=17),
    "averaged": Loop(average="main", seed=18),
    "a step more": Loop(extra=True, seed=19),
    "scaled": Loop(scaled=True, seed=26),
    "scaled, fused": Loop(scaled=True, optimizer=fused, seed=27),
    "own gradients": Loop(own=True, seed=20),
    "state read": Loop(state=True, seed=21),
    "gradients read on a side stream": Loop(log="side", seed=22),
    "averaged on a side stream": Loop(average="side", seed=23),
    "read late on a side stream": Loop(late=True, seed=30),
    "a block on a side stream": Loop(side=True, steps=4, seed=24),
    "goes on on another stream": Loop(change=True, steps=5, seed=25),
    "all at once": Loop(
        side=True, change=True, average="side", log="side", clip=True, accumulate=1, steps=4
    ),
}


NEVER_WAITING = [name for name, loop in LOOPS.items() if loop.spare is None and name != "scaled"]
"""The host waits only for a parameter that has no gradient here, of which nobody can know before it
is combined; and a ``GradScaler`` lets it wait."""


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("kind", LANES)
def test_training_reads_the_same_as_without(kind: str, name: str) -> None:
    for seen, expected in zip(with_lane(LOOPS[name], kind), plainly(LOOPS[name]), strict=True):
        assert same(LOOPS[name], seen.values, expected)
        assert seen.races == []
        if name in NEVER_WAITING:
            assert seen.host_waits == []


def test_a_scaler_waits_as_often_as_by_itself() -> None:
    loop = LOOPS["scaled"]
    for seen in with_lane(loop, "stream"):
        assert seen.host_waits == ["_local_scalar_dense"] * loop.steps


@pytest.mark.parametrize("kind", LANES)
def test_a_gradient_cannot_be_read_inside_the_backward_pass(kind: str) -> None:
    def read(trainer: Soonest) -> None:
        model = trainer.model

        def hook(gradient: torch.Tensor) -> None:
            assert model.last.bias.grad is not None
            model.last.bias.grad.sum()

        hidden = torch.tanh(model.first(torch.ones(2, 4)))
        hidden.register_hook(hook)
        loss = model.last(model.spare(model.middle(hidden))).sum()
        with pytest.raises(ReadTooEarlyError, match="read it after backward"):
            loss.backward()

    # One bucket, which is complete only when the first layer has its gradients.
    before, worlds.plan_for = worlds.plan_for, _one_bucket
    try:
        with_lane(Loop(steps=1), kind, before_close=read)
    finally:
        worlds.plan_for = before


def _one_bucket(loop: Loop, layout: Any) -> Any:
    from soonest.core.plan import Bucket, Op, Plan

    (flat,) = layout.flats
    bucket = Bucket(0, 0, flat.numel, "allreduce", tuple(slot.layer for slot in flat.slots))
    return Plan(worlds.RANKS, layout.flats, (bucket,), (Op(0, "all_reduce"),))


def several_steps(trainer: Soonest) -> None:
    for _ in range(5):
        step(trainer)


def step(trainer: Soonest) -> None:
    trainer.model(torch.ones(2, 4)).sum().backward()
    trainer.optimizer.step()
    trainer.engine.flush()


@pytest.mark.parametrize("kind", LANES)
def test_a_rank_that_leaves_is_an_error_that_names_the_bucket(kind: str) -> None:
    trained = threading.Barrier(worlds.RANKS, timeout=30)

    def leave(trainer: Soonest) -> None:
        trained.wait()
        if trainer.engine.ranks.group.rank() == 1:
            trainer.engine.ranks.group._meeting.leave()  # type: ignore[attr-defined]
            return
        with pytest.raises(PeerLostError) as found:
            several_steps(trainer)
        assert "step " in str(found.value)
        assert ": bucket " in str(found.value)
        assert "rank 1 did not take part" in str(found.value)
        with pytest.raises(PeerLostError):
            trainer.engine.flush()

    with_lane(Loop(), kind, before_close=leave)


@pytest.mark.parametrize("kind", LANES)
def test_an_update_that_fails_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(trainer: Soonest) -> None:
        def update(*_: Any) -> None:
            raise KeyError("boom")

        trainer.engine.bound_plan.update = update  # type: ignore[method-assign]
        with pytest.raises(SoonestError, match="boom"):
            step(trainer)
        assert trainer.lane.error is not None

    with_lane(Loop(steps=1), kind, before_close=fail)


# Only on streams


@st.composite
def loops(draw: st.DrawFn) -> Loop:
    loop = Loop(
        steps=draw(st.integers(1, 4)),
        optimizer=draw(st.sampled_from([worlds.sgd, adamw])),
        seed=draw(st.integers(0, 10_000)),
        sharded=draw(st.booleans()),
        backwards=draw(st.integers(1, 2)),
        accumulate=draw(st.integers(0, 1)),
        discard=draw(st.booleans()),
        spare=draw(st.sampled_from([None, lambda step, rank: (step + rank) % 3 == 0])),
        zero=draw(st.sampled_from(["none before", "zero before", "none after", "zero after"])),
        clip=draw(st.booleans()),
        log=draw(st.sampled_from(["", "main", "side"])),
        average=draw(st.sampled_from(["", "main", "side"])),
        late=draw(st.booleans()),
        side=draw(st.booleans()),
        change=draw(st.booleans()),
        touch=draw(st.booleans()),
    )
    if loop.sharded and loop.spare is not None:  # to add to parts, every rank would have to
        loop = replace(loop, backwards=1, accumulate=0, discard=False)
    return loop


@settings(deadline=None, max_examples=12)
@given(loops())
def test_no_loop_has_a_race(loop: Loop) -> None:
    for seen, expected in zip(with_lane(loop, "stream"), plainly(loop), strict=True):
        assert seen.races == []
        assert same(loop, seen.values, expected)


TIGHT = {
    "sharded": Loop(steps=2, seed=3, sharded=True, touch=True),
    "zeroed": Loop(steps=2, seed=2, zero="zero after", touch=True),
}


@pytest.mark.parametrize("name", TIGHT)
def test_every_wait_is_needed(name: str) -> None:
    """Leaving out any one of them makes a race, which the detector finds."""
    loop = TIGHT[name]
    (seen, _) = with_lane(loop, "stream")
    missed: list[int] = []
    for number in range(seen.waits):
        (broken, _) = with_lane(loop, "stream", streams=lambda n=number: FakeStreams(without=[n]))
        if not broken.races:
            missed.append(number)
    assert missed == [], f"of {seen.waits}"


def check_on(use: Callable[[Soonest, FakeStreams], None]) -> None:
    """Calls ``use`` on every rank, once its streams hold what a step has enqueued."""
    made: dict[int, FakeStreams] = {}

    def before_close(trainer: Soonest) -> None:
        streams: FakeStreams = trainer.lane._streams
        made[id(trainer)] = streams
        use(trainer, streams)

    with_lane(Loop(steps=1), "stream", before_close=before_close)
    assert len(made) == worlds.RANKS


def test_a_training_that_is_dropped_is_not_kept() -> None:
    found: list[Any] = []

    def use(trainer: Soonest, streams: FakeStreams) -> None:
        found.append(weakref.ref(trainer.engine))
        # What the process keeps until the engine is gone.
        weakref.finalize(trainer.engine, trainer.lane.close).atexit = False
        step(trainer)
        trainer.close = lambda: None  # type: ignore[method-assign]

    check_on(use)
    gc.collect()
    assert [engine() for engine in found] == [None, None]


def test_graphs_are_refused() -> None:
    def use(trainer: Soonest, streams: FakeStreams) -> None:
        trainer.model(torch.ones(2, 4)).sum().backward()
        trainer.optimizer.step()
        streams.in_graph = True
        with pytest.raises(SoonestError, match="graph of the device's operations"):
            trainer.model(torch.ones(2, 4))
        with pytest.raises(SoonestError, match="graph of the device's operations"):
            trainer.optimizer.step()
        streams.in_graph = False

    check_on(use)


def test_graphs_are_refused_also_when_nothing_is_in_flight() -> None:
    """The graph would run again when something is."""

    def use(trainer: Soonest, streams: FakeStreams) -> None:
        trainer.engine.flush()
        streams.in_graph = True
        with (
            torch.no_grad(),
            pytest.raises(SoonestError, match=r"train without graphs, or detach\(\)"),
        ):
            trainer.model(torch.ones(2, 4))
        streams.in_graph = False
        trainer.model(torch.ones(2, 4))

    check_on(use)


def test_memory_that_runs_out_is_no_other_ranks_fault() -> None:
    def use(trainer: Soonest, streams: FakeStreams) -> None:
        def issue(*_: Any) -> None:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

        trainer.engine.bound_plan.issue = issue  # type: ignore[method-assign]
        with pytest.raises(
            SoonestError, match=r"step 1: bucket .* was not sent: tried to"
        ) as found:
            trainer.model(torch.ones(2, 4)).sum().backward()
        assert not isinstance(found.value, PeerLostError)

    check_on(use)


def test_a_step_without_a_backward_pass_is_named_as_such() -> None:
    told: list[str] = []

    def use(trainer: Soonest) -> None:
        def issue(*_: Any) -> None:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

        trainer.engine.flush()
        trainer.engine.bound_plan.issue = issue  # type: ignore[method-assign]
        with pytest.raises(SoonestError, match="was not sent: tried to") as found:
            trainer.optimizer.step()
        told.append(str(found.value))

    with_lane(Loop(steps=1, sharded=True), "stream", before_close=use)
    assert all("step 1, for which there was no backward pass: bucket " in one for one in told)


def test_updates_come_in_the_order_of_need() -> None:
    """An op may end at once, and that of the first layer is often the last in the plan."""

    def use(trainer: Soonest, streams: FakeStreams) -> None:
        bound_plan, updated = trainer.engine.bound_plan, list[int]()
        update = bound_plan.update

        def note(pass_state: Any, bucket: int) -> None:
            updated.append(bucket)
            update(pass_state, bucket)

        bound_plan.update = note  # type: ignore[method-assign]
        step(trainer)
        assert updated == bound_plan.by_need
        assert updated != list(dict.fromkeys(op.bucket for op in bound_plan.plan.ops))

    check_on(use)


def test_what_does_not_end_is_named() -> None:
    def use(trainer: Soonest, streams: FakeStreams) -> None:
        streams._patience = 10**9
        trainer.lane._enqueued._timeout_s = -1.0
        with pytest.raises(PeerLostError) as found:
            trainer.engine.flush()
        assert "step 0: bucket " in str(found.value)
        assert "rank 1 did not take part" in str(found.value)

    check_on(use)


def test_what_the_device_says_has_failed_is_named() -> None:
    def use(trainer: Soonest, streams: FakeStreams) -> None:
        streams.failed = RuntimeError("unspecified launch failure")
        with pytest.raises(PeerLostError, match=r"step 0: bucket .* launch failure"):
            trainer.engine.flush()

    check_on(use)


def test_what_the_backend_knows_to_have_failed_is_named() -> None:
    def use(trainer: Soonest, streams: FakeStreams) -> None:
        streams._patience = 10**9
        trainer.lane._enqueued._broken = lambda: "NCCL says REMOTE_ERROR"
        with pytest.raises(PeerLostError, match="REMOTE_ERROR"):
            trainer.engine.flush()

    check_on(use)


@pytest.mark.parametrize("spreads", [True, False])
def test_buffers_that_land_on_one_stream_are_there_for_all(spreads: bool) -> None:
    meeting, ranks = Meeting(2), [nn.BatchNorm1d(4), nn.BatchNorm1d(4)]

    def each(rank: int) -> list[str]:
        streams, model = FakeStreams(), ranks[rank]
        streams.detector.private.add(streams.main)  # what is sent is not the user's
        side = streams.stream("side")
        lane = StreamLane(streams, timeout_s=30, failures=worlds.FAILURES)
        if not spreads:
            lane.spread = lambda used=(): None  # type: ignore[method-assign]
        group: Any = FakeGroup(meeting, rank, streams)
        buffers = Buffers(model, lambda: group, lane, worlds.FAILURES)
        assert model.running_mean is not None
        buffers.forward_begins(0)
        model.running_mean.fill_(rank)
        with watched(streams, *model.buffers()):
            lane.wait_all()
            lane.enter()
            lane._order.see_user()
            buffers.share(0)
            streams.follow(side, streams.main)
            with streams.use(side):
                buffers.forward_begins(1)
                assert model.running_mean.sum() == 0
            streams.detector.host_waits.clear()
            model.running_mean.clone()
            torch.ones(3).add_(1)
        return streams.detector.races

    first, second = as_threads(each, 2)
    assert first == []
    assert (second == []) == spreads
    assert spreads or any("is freed" in race for race in second)


def test_a_scale_that_is_given_to_an_update_is_not_freed_too_early() -> None:
    """As ``GradScaler`` does with optimizers that unscale by themselves."""

    def use(keeps: bool) -> list[str]:
        races: list[str] = []

        def before_close(trainer: Soonest) -> None:
            from helpers.race import Watch

            streams: FakeStreams = trainer.lane._streams
            if not keeps:
                streams.keep = lambda tensor, stream: None  # type: ignore[method-assign]
            with Watch(streams):
                trainer.model(torch.ones(2, 4)).sum().backward()
                scale = torch.ones(1) * 2
                trainer.optimizer.found_scale = scale  # type: ignore[attr-defined]
                original = trainer.engine.bound_plan.update

                def update(pass_state: Any, bucket: int) -> None:
                    original(pass_state, bucket)
                    pass_state.step.attributes["found_scale"].mul(1.0)

                trainer.engine.bound_plan.update = update  # type: ignore[method-assign]
                trainer.optimizer.step()
                del trainer.optimizer.found_scale, scale  # type: ignore[attr-defined]
                pass_state: Any = trainer.engine.backward.latest
                pass_state.step.attributes.clear()
                torch.ones(3).add_(1)
                del trainer.engine.bound_plan.update
            if trainer.engine.ranks.group.rank() == 0:
                races.extend(streams.detector.races)

        with_lane(Loop(steps=1), "stream", before_close=before_close)
        return races

    assert use(keeps=True) == []
    assert any("is freed" in race for race in use(keeps=False))


def test_loops_are_of_many_kinds() -> None:
    """What is named above holds under any plan."""
    seeds = random.Random(1).sample(range(10_000), 3)
    for seed in seeds:
        loop = replace(LOOPS["all at once"], seed=seed)
        for seen, expected in zip(with_lane(loop, "stream"), plainly(loop), strict=True):
            assert same(loop, seen.values, expected)
            assert seen.races == []
