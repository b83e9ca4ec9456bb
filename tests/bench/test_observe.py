"""A step of plain DistributedDataParallel as a timeline, without disturbing the training."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers.ranks import run_ranks
from soonest.bench.observe import DdpObserver
from soonest.core.timeline import Timeline, covered_s

SIZES = (64, 300, 300, 300, 8)


def make() -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = [nn.Linear(*sizes) for sizes in itertools.pairwise(SIZES)]
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=0.3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    torch.manual_seed(100 * dist.get_rank() + number)
    loss = model(torch.randn(16, SIZES[0])).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def watched() -> dict[str, Any]:
    model, optimizer = make()
    for number in range(2):
        step(model, optimizer, number)
    observer = DdpObserver(model, optimizer)
    assert observer.timeline() is None
    step(model, optimizer, 2)
    assert observer.timeline() is None, "its forward pass has not come yet"
    for number in range(3, 6):
        step(model, optimizer, number)
    with torch.no_grad():
        model(torch.randn(16, SIZES[0]))
    timeline = observer.timeline()
    assert timeline is not None
    observer.remove()
    step(model, optimizer, 6)
    assert observer.timeline() == timeline
    return {"timeline": timeline, "parameters": [p.detach() for p in model.parameters()]}


def unwatched() -> list[torch.Tensor]:
    model, optimizer = make()
    for number in range(7):
        step(model, optimizer, number)
    return [parameter.detach() for parameter in model.parameters()]


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return run_ranks(watched, 2)


@pytest.fixture
def timeline(seen: list[dict[str, Any]]) -> Timeline:
    return seen[0]["timeline"]


def test_watching_changes_no_bit(seen: list[dict[str, Any]]):
    expected = run_ranks(unwatched, 2)[0]
    for rank in seen:
        for mine, theirs in zip(rank["parameters"], expected, strict=True):
            assert torch.equal(mine, theirs)


def test_every_layer_computes_once_in_its_order(timeline: Timeline):
    assert [span.name for span in timeline.of("forward")] == ["0", "1", "2", "3"]
    assert [span.name for span in timeline.of("backward")] == ["3", "2", "1", "0"]


def test_every_layer_is_sent_once_when_it_is_ready(timeline: Timeline):
    ready = {span.name: span.end_s for span in timeline.of("backward")}
    sent: list[str] = []
    for span in timeline.of("send"):
        layers = span.name.rpartition(" of ")[2].removesuffix(")").split(", ")
        assert layers == sorted(layers)
        assert span.start_s >= max(ready[layer] for layer in layers)
        sent += layers
    assert sorted(sent) == ["0", "1", "2", "3"]
    assert len(timeline.of("send")) > 1


def test_it_waits_then_updates_then_computes(timeline: Timeline):
    [update] = timeline.of("update")
    ended = max(span.end_s for span in timeline.of("send"))
    computed = max(span.end_s for span in timeline.of("backward"))
    if ended > computed:
        [wait] = timeline.of("wait")
        assert (wait.start_s, wait.end_s) == (computed, ended)
    assert computed <= update.start_s <= update.end_s <= timeline.of("forward")[0].start_s
    assert timeline.of("forward")[-1].end_s == pytest.approx(timeline.step_s)


def test_compute_does_one_thing_at_a_time(timeline: Timeline):
    spans = [span for span in timeline.spans if span.track == "compute"]
    together = sum(span.end_s - span.start_s for span in spans)
    assert together == pytest.approx(covered_s((s.start_s, s.end_s) for s in spans))
    assert together <= timeline.step_s
