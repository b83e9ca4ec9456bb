"""Flat buffers and parameters show what they are, and new ones are made only for a new order."""

from __future__ import annotations

import torch
from torch import nn

from helpers.ranks import mixed_network
from soonest.core.plan import Plan
from soonest.core.planner.planner import first_plan
from soonest.runtime.comm import EXACT
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.guard.pending import PendingTensor
from soonest.runtime.optim.shard import shards_of


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, dtype=torch.float64))


def sharded_plan(layout: FlatBuffers) -> Plan:
    return first_plan(layout.flats, mixed_network(2), ranks=2, window=2, methods=("shard",))


def test_buffers_and_parameters_show_themselves_in_one_line() -> None:
    layout = FlatBuffers(model())
    float32, float64 = (flat.numel for flat in layout.flats)
    assert repr(layout) == (
        f"FlatBuffers({float32} float32, {float64} float64; 4 parameters: 0.weight … 1.bias)"
    )
    weight = layout.params[0]
    start = weight.slot.start
    assert repr(weight) == f"FlatParam(0.weight, buffer 0[{start}:{start + 12}])"


def test_what_is_pending_shows_that_without_waiting() -> None:
    tensor = torch.ones(2, 3)
    known = PendingTensor(tensor, lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert repr(known) == "PendingTensor(Tensor (2, 3), ready)"
    known.mark_pending()
    assert repr(known) == "PendingTensor(Tensor (2, 3), pending)"
    known.release()


def test_shards_show_their_parameter_and_elements() -> None:
    layout = FlatBuffers(model())
    plan = sharded_plan(layout)
    both = [shards_of(plan, layout, rank, EXACT) for rank in range(2)]
    shown = [repr(shard) for of_rank in both for of_bucket in of_rank for shard in of_bucket]
    assert "ParamShard(" in shown[0]
    assert sum(shard.stop - shard.start for of_rank in both for b in of_rank for shard in b) == 23
    assert any(text.startswith("ParamShard(0.weight[0:") for text in shown)


def test_buffers_that_have_an_order_already_are_kept() -> None:
    layout = FlatBuffers(model())
    names = [param.name for param in layout.params]
    assert layout.in_order(names) is layout
    other = layout.in_order(names[::-1])
    assert other is not layout
    assert [param.name for param in other.params] == names[::-1]
    assert [param.alias for param in other.params] == [p.alias for p in layout.params[::-1]]
