"""A profile names what soonest does, and for which layers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import soonest
from helpers import worlds
from helpers.ranks import run_ranks
from soonest.core.plan import Bucket, Flat, Op, Plan, Slot
from soonest.runtime.timing import spans

STEPS = 6


def profiled_steps() -> dict[str, set[str]]:
    """By thread, the names of soonest's spans in the trace that a profiler exports."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    soonest.prioritize(model, optimizer, method="allreduce")
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=config) as profile:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).sum().backward()
            optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found: dict[str, set[str]] = {}
    for event in events:
        if str(event.get("name")).startswith("soonest::"):
            found.setdefault(str(event["tid"]), set()).add(event["name"])
    return found


def test_an_exported_trace_names_ops_updates_waits_and_plans() -> None:
    for by_thread in run_ranks(profiled_steps, 2):
        names = set().union(*by_thread.values())
        assert any(n.startswith("soonest::all_reduce bucket 0 (0") for n in names), names
        for what in ("update", "wait for"):
            assert any(n.startswith(f"soonest::{what} bucket 0 (0") for n in names), names
        assert any(n.startswith("soonest::plan anew: ") for n in names), names
        assert len(by_thread) > 1  # the lane's threads, too


def test_streams_have_spans_too() -> None:
    with torch.profiler.profile(
        experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    ) as profile:
        worlds.with_lane(worlds.Loop(), "stream")
    names = {event.name for event in profile.events() or ()}
    assert {"soonest::update", "soonest::reduce_scatter"} & {n.split(" bucket")[0] for n in names}


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ((), "send bucket 0 ()"),
        (("a",), "send bucket 0 (a)"),
        (("a", "b", "c"), "send bucket 0 (a ... c)"),
    ],
)
def test_a_bucket_is_named_by_its_first_and_last_layer(layers: tuple[str, ...], told: str) -> None:
    slots = tuple(Slot(name, name, index, 1) for index, name in enumerate(layers)) or (
        Slot("x", "", 0, 1),
    )
    flat = Flat("float32", 4, len(slots) + 1, slots)
    plan = Plan(
        2, (flat,), (Bucket(0, 0, flat.numel, "allreduce", layers),), (Op(0, "all_reduce"),), 1
    )
    assert spans.of_bucket("send", plan, 0) == told


def test_no_name_is_made_where_no_profiler_runs() -> None:
    def name() -> str:
        raise AssertionError

    with spans.span(name):
        pass
