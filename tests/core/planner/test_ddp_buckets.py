"""The buckets of DistributedDataParallel, compared with those that torch itself computes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from helpers import strategies
from soonest.core.cost import Cost, Network
from soonest.core.plan import Flat, Plan
from soonest.core.planner.ddp_buckets import CAP_BYTES, FIRST_BYTES, filled, make_ddp_buckets
from soonest.core.planner.planner import backward_order

NETWORK = Network(
    {kind: Cost.linear(1e-3, 1e9) for kind in ("all_reduce", "all_gather", "exchange")}
)
MB = 1 << 20


def flat_of(*sizes_mb: float) -> Flat:
    layers = [(f"{i}.weight", str(i), int(size * MB) // 4) for i, size in enumerate(sizes_mb)]
    return Flat.lay_out("float32", 4, layers)


def layers_of(flat: Flat) -> list[tuple[str, ...]]:
    """Of the buckets, in the order of a backward pass."""
    buckets = make_ddp_buckets([flat], NETWORK, methods=["gather", "allreduce"])
    assert {bucket.method for bucket in buckets} == {"allreduce"}
    return [bucket.layers for bucket in buckets[::-1]]


def test_the_first_bucket_is_closed_early_and_no_parameter_is_sliced():
    assert layers_of(flat_of(1, 20, 10, 100, 0.6, 0.5)) == [
        ("4", "5"),
        ("3",),
        ("1", "2"),
        ("0",),
    ]


@given(st.lists(st.sampled_from([0.01, 0.5, 1.0, 3.0, 9.0, 30.0, 70.0]), min_size=1, max_size=20))
def test_they_are_those_that_torch_computes(sizes_mb: list[float]):
    flat = flat_of(*sizes_mb)
    tensors = [torch.empty(slot.numel, device="meta") for slot in reversed(flat.slots)]
    indices, _ = dist._compute_bucket_assignment_by_size(
        tensors,
        [FIRST_BYTES, CAP_BYTES],
        [False] * len(tensors),
        list(range(len(tensors))),
    )
    names = [slot.layer for slot in reversed(flat.slots)]
    assert layers_of(flat) == [tuple(names[i] for i in reversed(each)) for each in indices]


def test_a_method_that_is_asked_for_is_kept_to():
    (bucket,) = make_ddp_buckets([flat_of(0.1)], NETWORK, methods=["gather"])
    assert bucket.method == "gather"


def test_torch_has_not_changed_the_sizes():
    assert FIRST_BYTES == dist._DEFAULT_FIRST_BUCKET_BYTES
    model = torch.nn.Linear(1, 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()
    assert ddp.bucket_bytes_cap == CAP_BYTES


@given(st.data())
def test_any_model_makes_a_plan(data: st.DataObject):
    flats = data.draw(strategies.flats(data.draw(strategies.traces())))
    network = data.draw(strategies.networks)
    buckets = make_ddp_buckets(flats, network, methods=network.methods)
    plan = Plan(2, tuple(flats), buckets, backward_order(flats, buckets), blocking=True)
    assert sum(len(slots) for slots in plan.slots_of) == sum(len(flat.slots) for flat in flats)


def test_a_bucket_is_closed_as_soon_as_it_has_enough():
    assert filled([10, 10, 20, 10], [10, 30]) == [1, 2, 1]
    assert filled([10, 9, 1, 30], [10, 10, 30]) == [1, 2, 1]
    assert filled([5, 4, 1], [100]) == [3]
    assert filled([], [10]) == []
