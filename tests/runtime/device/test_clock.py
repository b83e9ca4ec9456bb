"""Times of a device: noted without waiting, and asked for later."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from helpers import worlds
from helpers.fake_ranks import FakeGroup, Meeting, ranks_for
from helpers.race import FakeStreams
from helpers.worlds import Loop, Net, Soonest, with_lane
from soonest.core.cost import Network
from soonest.core.plan import Plan
from soonest.core.planner.planner import first_plan
from soonest.runtime.comm import EXACT
from soonest.runtime.device.clock import DeviceClock, Ends, Moment
from soonest.runtime.engine.detach import detach
from soonest.runtime.engine.engine import Engine
from soonest.runtime.execute.stream_lane import StreamLane
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.timing.step_record import NEVER, Record
from soonest.runtime.tuning import autotuner


def test_a_record_gets_the_times_of_its_device() -> None:
    streams = FakeStreams()
    record = Record(2, 1, 1, clock=DeviceClock(streams))
    record.backward_began = record.now()
    record.ready[1] = record.now()
    record.op_started(0)
    record.op_ended(0)
    assert isinstance(record.ready[1], Moment)
    record.settle()
    # A fake device takes a microsecond from one event to the next.
    assert [record.backward_began, record.ready[1], record.op_start[0], record.op_end[0]] == (
        pytest.approx([0, 1e-6, 2e-6, 3e-6])
    )
    assert math.isnan(record.ready[0])
    assert math.isnan(record.forward_ended)
    assert not isinstance(record.ready[1], Moment)


def test_a_step_that_is_not_watched_closely_asks_the_device_for_nothing() -> None:
    record = Record(1, closely=False, clock=DeviceClock(FakeStreams()))
    assert not isinstance(record.now(), Moment)
    record.settle()
    assert record.ready == [NEVER] or math.isnan(record.ready[0])


def test_ends_of_steps_are_told_when_the_device_has_got_there() -> None:
    streams = FakeStreams(patience=1)
    asked = streams.seconds

    def seconds(first: Any, last: Any) -> float:
        assert streams._asked[last.number] > 1, "it would wait"
        return asked(first, last)

    streams.seconds = seconds  # type: ignore[method-assign]
    ends = Ends(DeviceClock(streams))
    told = [ends.step() for _ in range(6)]
    assert [len(some) for some in told] == [0, 1, 1, 1, 1, 1], "the device is a step behind"
    # Each step is one event.
    assert [at for some in told for at in some] == pytest.approx([0, 1e-6, 2e-6, 3e-6, 4e-6])


def test_a_model_is_measured_on_its_device() -> None:
    def before_close(trainer: Soonest) -> None:
        trainer.engine.profiler.attention.learning = True
        for _ in range(4):
            trainer.model(torch.ones(2, 4)).sum().backward()
            trainer.optimizer.step()
        profiler = trainer.engine.profiler
        trace, timeline = profiler.trace(), profiler.timeline()
        assert trace is not None
        assert {layer.name for layer in trace.layers} == {"first", "middle", "spare", "last"}
        # Two events to the microsecond, at most a few dozen between two layers.
        assert all(0 < layer.fwd_us < 200 for layer in trace.layers)
        assert all(0 <= layer.bwd_us < 200 for layer in trace.layers)
        assert timeline is not None
        assert {span.track for span in timeline.spans} >= {"compute", "network", "update"}

    with_lane(Loop(steps=1), "stream", before_close=before_close)


def test_nothing_is_learned_from_the_first_steps_of_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autotuner.comm, "first_rank_object", lambda group, mine: mine)
    monkeypatch.setattr(autotuner, "agree_on_plan", lambda group, plan: None)
    monkeypatch.setenv("SOONEST_CACHE", "")
    streams = FakeStreams(patience=0)
    model = Net()
    layout, network = FlatBuffers(model), Network.linear(1e-4, 1e8)
    methods = ("allreduce",)
    plan = first_plan(layout.flats, network, ranks=1, window=2, methods=methods)
    learner = autotuner.AutoTuner(network, window=2, methods=methods, ranks=1, job={})
    learner.start_with(layout)
    optimizer = worlds.sgd(model)
    plans: list[Plan] = []
    records: list[Any] = []
    first = learner._first
    monkeypatch.setattr(
        learner, "_first", lambda engine: (records.append(engine.profiler.record), first(engine))
    )
    engine = Engine(
        model,
        optimizer,
        separable=True,
        layout=layout,
        plan=plan,
        ranks=ranks_for(FakeGroup(Meeting(1), 0, streams)),
        lane=StreamLane(streams, timeout_s=30, failures=worlds.FAILURES),
        sharing=None,
        wire=EXACT,
        failures=worlds.FAILURES,
        after_step=learner,
    )
    engine.settled = False
    while not engine.settled and len(plans) < 100:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        plans.append(engine.bound_plan.plan)
    assert engine.settled
    assert plans[autotuner._WARM_UP - 1] is plan
    assert plans[autotuner._WARM_UP] is not plan
    (learned_from,) = records
    assert learned_from.closely
    assert " ms a step" in engine.history[-1]
    # From then on, too, it is the device whose steps are watched.
    monkeypatch.setattr(autotuner, "now_s", lambda: pytest.fail("the host's clock was asked"))
    for _ in range(40):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert learner._drift._usual_s is not None
    assert 0 < learner._drift._usual_s < 1e-3, "some events, a microsecond each"
    detach(engine)
