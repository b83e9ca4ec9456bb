"""What ranks compare of their requests, and what follows a step, each by itself."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from soonest.core.plan import Bucket, Flat, Op, Plan
from soonest.runtime.guard.hooks import noop
from soonest.runtime.options import Options
from soonest.runtime.setup import assembly
from soonest.runtime.setup.request import Request, TrainingPart


def request(options: Options | None = None, *, plan: Plan | None = None, every: int = 0) -> Request:
    model, group = nn.Linear(2, 2), None
    unused: Any = group
    return Request(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        options=options or Options(),
        part=TrainingPart(),
        group=unused,
        plan=plan,
        compare_every=every,
        refused=None,
    )


def plan() -> Plan:
    flat = Flat.lay_out("float32", 4, [("a", "a", 250_000 - 1)])
    bucket = Bucket(0, 0, flat.numel, "allreduce", ("a",))
    return Plan(3, (flat,), (bucket,), (Op(0, "all_reduce"),))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("separable", True),
        ("method", "gather"),
        ("shard_optimizer", True),
        ("wire_dtype", torch.bfloat16),
        ("parameter_wire_dtype", torch.bfloat16),
        ("broadcast_buffers", False),
    ],
)
def test_what_has_to_be_the_same_on_all_ranks_is_compared(name: str, value: object) -> None:
    before, after = request().asked, request(replace(Options(), **{name: value})).asked  # type: ignore[arg-type]
    assert {key for key in before if before[key] != after[key]} == {name}


def test_time_outs_may_differ() -> None:
    assert request(replace(Options(), timeout_s=5.0)).asked == request().asked


def test_whether_there_is_a_plan_and_how_often_ranks_compare_is_compared() -> None:
    assert request(plan=plan()).asked != request().asked
    assert request(every=3).asked != request().asked
    assert request().asked["the optimizer"] == "SGD (the only one)"


def planned(*, comparing: Any = None, sharded: bool = False) -> Any:
    layout = SimpleNamespace(params=[1, 2])
    return SimpleNamespace(layout=layout, plan=plan(), sharded=sharded, comparing=comparing)


def test_what_is_begun_is_told_in_a_sentence() -> None:
    assert assembly._begun(request(), planned()) == (
        "Linear and SGD on 3 ranks: 2 parameters, 1.0 MB of gradients, in 1 buckets by allreduce"
    )
    told = assembly._begun(request(plan=plan()), planned(sharded=True))
    assert "on 3 ranks, each rank with its part of the optimizer's state: 2" in told
    assert told.endswith("by allreduce, as given")


def test_a_plan_that_is_given_stays() -> None:
    """What learns from steps is called after each, unless nothing is to be learned."""
    calls: list[Any] = []
    tuner: Any = calls.append
    connection: Any = SimpleNamespace(failures=SimpleNamespace(together=lambda what: nullcontext()))
    engine: Any = SimpleNamespace(backward=SimpleNamespace(passes=1))
    assembly._after_step(request(), connection, planned(), tuner)(engine)
    assert calls == [engine]
    assert assembly._after_step(request(plan=plan()), connection, planned(), tuner) is noop
