"""Plans: how parameters are laid out, what a plan refuses, and how two plans are told apart."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import strategies
from soonest.core.plan import (
    GATHER_PARAMETERS,
    METHODS,
    Bucket,
    Flat,
    Op,
    Plan,
    borders,
    first_difference,
)
from soonest.core.planner.planner import first_plan

FLAT = Flat.lay_out(
    "float32", 4, [("a.weight", "a", 20), ("a.bias", "a", 15), ("b.weight", "b", 16)]
)
PLAN = Plan(
    ranks=2,
    flats=(FLAT,),
    buckets=(Bucket(0, 0, 16, "allreduce", ("a",)), Bucket(0, 16, 80, "allreduce", ("a", "b"))),
    ops=(Op(1, "all_reduce"), Op(0, "all_reduce")),
)


def test_parameters_start_aligned_with_a_count_behind_each():
    assert [slot.start for slot in FLAT.slots] == [0, 32, 48]
    assert [slot.count_at for slot in FLAT.slots] == [20, 47, 64]
    assert FLAT.numel == 80


@given(st.lists(st.integers(1, 100), max_size=5), st.sampled_from([1, 2, 4, 8]))
def test_slots_never_overlap(sizes: list[int], itemsize: int):
    flat = Flat.lay_out("x", itemsize, [(str(i), str(i), n) for i, n in enumerate(sizes)])
    ends = [slot.start for slot in flat.slots[1:]] + [flat.numel]
    for slot, end in zip(flat.slots, ends, strict=False):
        assert slot.count_at < end <= slot.count_at + flat.align
        assert slot.start * itemsize % 64 == 0


def test_bucket_bytes_and_slots():
    assert [PLAN.bucket_bytes(i) for i in range(2)] == [64, 256]
    assert PLAN.slots_of == ((0,), (0, 1, 2))


def test_a_bucket_with_only_the_count_of_a_slot_carries_the_slot():
    flat = Flat.lay_out("float32", 4, [("a", "a", 16)])
    cut_at_count = (Bucket(0, 0, 16, "allreduce", ("a",)), Bucket(0, 16, 32, "allreduce", ("a",)))
    plan = Plan(1, (flat,), cut_at_count, (Op(0, "all_reduce"), Op(1, "all_reduce")))
    assert plan.slots_of == ((0,), (0,))


def test_ops_of_a_bucket_follow_each_other():
    first = replace(PLAN.buckets[0], method="shard_direct")
    second = replace(PLAN.buckets[1], method="shard")
    kinds = "reduce_scatter", "ring_reduce_scatter", GATHER_PARAMETERS, GATHER_PARAMETERS
    ops = tuple(Op(index % 2, kind) for index, kind in enumerate(kinds))
    plan = replace(PLAN, buckets=(first, second), ops=ops)
    assert plan.before == (-1, -1, 0, 1)
    assert plan.reduces == {0, 1}, "parameters are gathered after the gradients are reduced"
    assert (plan.sharded, plan.reducing) == (True, 2)
    assert PLAN.before == (-1, -1)
    assert PLAN.reduces == {0, 1}


def test_describe_names_size_and_layers():
    assert PLAN.describe(1) == "bucket 1 (0.00 MB of a, b)"
    many = replace(PLAN.buckets[1], layers=("a", "b", "c", "d", "e"))
    assert "a, b, c and 2 more" in replace(PLAN, buckets=(PLAN.buckets[0], many)).describe(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buckets": (replace(PLAN.buckets[0], method="pigeon"), PLAN.buckets[1])}, "'pigeon'"),
        ({"buckets": (PLAN.buckets[0], replace(PLAN.buckets[1], flat=1))}, "there is none"),
        ({"buckets": (PLAN.buckets[0], replace(PLAN.buckets[1], start=32))}, "must start at 16"),
        ({"buckets": (PLAN.buckets[0], replace(PLAN.buckets[1], start=15))}, "must start at 16"),
        ({"buckets": (PLAN.buckets[0], replace(PLAN.buckets[1], stop=16))}, "not be empty"),
        ({"buckets": PLAN.buckets[:1], "ops": PLAN.ops[1:]}, "16 of flat buffer 0's 80"),
        ({"ops": PLAN.ops[:1]}, "are missing, but its method takes all_reduce"),
        ({"ops": (*PLAN.ops, PLAN.ops[0])}, "are all_reduce, all_reduce, but"),
        ({"ops": (PLAN.ops[0], PLAN.ops[0])}, "are missing, but its method takes all_reduce"),
        ({"ops": (PLAN.ops[0], Op(0, "all_gather"))}, "are all_gather, but"),
        ({"ops": (*PLAN.ops, Op(2, "all_reduce"))}, "of bucket 2, there is none"),
        (
            {
                "buckets": (replace(PLAN.buckets[0], method="hierarchical"), PLAN.buckets[1]),
                "ops": (
                    Op(0, "all_reduce_across"),
                    Op(0, "reduce_inside"),
                    Op(0, "all_gather_inside"),
                    PLAN.ops[0],
                ),
            },
            "takes reduce_inside, all_reduce_across, all_gather_inside, in this order",
        ),
        (
            {
                "buckets": (replace(PLAN.buckets[0], method="shard"), PLAN.buckets[1]),
                "ops": (Op(0, "ring_reduce_scatter"), PLAN.ops[0], Op(0, GATHER_PARAMETERS)),
            },
            "shards all buckets or none",
        ),
        ({"window": 0}, "window is 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **change)


@given(st.data())
def test_json_round_trip_keeps_the_fingerprint(data: st.DataObject):
    flats = data.draw(strategies.flats(data.draw(strategies.traces())))
    plan = first_plan(flats, data.draw(strategies.networks), ranks=data.draw(strategies.ranks))
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert again.difference(plan) is None


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"ranks": 4}, "ranks: 2 / 4"),
        ({"window": 3}, "window: 2 / 3"),
        ({"blocking": True}, "blocking: False / True"),
        ({"ops": PLAN.ops[::-1]}, "ops[0].bucket: 1 / 0"),
        ({"flats": (replace(FLAT, dtype="int32"),)}, "flats[0].dtype: 'float32' / 'int32'"),
        (
            {
                "buckets": (Bucket(0, 0, 80, "allreduce", ("a", "b")),),
                "ops": (Op(0, "all_reduce"),),
            },
            "buckets[0].stop: 16 / 80",
        ),
    ],
)
def test_the_first_difference_is_named_and_changes_the_fingerprint(change: dict, difference: str):
    other = replace(PLAN, **change)
    assert PLAN.difference(other) == difference
    assert PLAN.fingerprint != other.fingerprint


def test_difference_of_lists_and_keys():
    assert first_difference({"a": [1, 2]}, {"a": [1, 2, 3]}) == "number of a: 2 / 3"
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == "b: None / 2"
    assert first_difference([[1], [2]], [[1], [3]]) == "[1][0]: 2 / 3"
    assert first_difference({"a": (1,)}, {"a": [1]}) is None


def test_json_of_another_format_is_refused():
    with pytest.raises(ValueError, match="format 2"):
        Plan.from_json({**PLAN.to_json(), "format": 2})


def test_a_plan_of_before_there_were_plans_that_block_can_be_read():
    text = PLAN.to_json()
    del text["blocking"]
    assert Plan.from_json(text) == PLAN


@pytest.mark.parametrize("data", [[1], "plan", None, 3])
def test_json_that_is_no_object_is_refused(data: object):
    with pytest.raises(ValueError, match="this is no plan: it is a JSON"):
        Plan.from_json(data)


@pytest.mark.parametrize(
    "change", [{"buckets": [{"flat": 0}]}, {"flats": [{}]}, {"ops": [{"x": 1}]}]
)
def test_broken_json_is_refused(change: dict):
    with pytest.raises(ValueError, match="this is no plan"):
        Plan.from_json({**PLAN.to_json(), **change})


def test_what_follows_what_and_what_combines_a_bucket():
    """Two buckets by three ops each, the second one a step ahead; sharding ends with a gathering
    that combines nothing."""
    flat = Flat.lay_out("float32", 4, [("a", "a", 15), ("b", "b", 15)])

    def plan_of(method: str, *kinds: str) -> Plan:
        buckets = tuple(Bucket(0, 16 * i, 16 * i + 16, method, (n,)) for i, n in enumerate("ab"))
        ops = tuple(Op(bucket, kind) for kind in kinds for bucket in (1, 0))
        return Plan(4, (flat,), buckets, ops)

    hierarchical = plan_of("hierarchical", *METHODS["hierarchical"])
    assert hierarchical.before == (-1, -1, 0, 1, 2, 3)
    assert hierarchical.reduces == {4, 5}
    assert hierarchical.reducing == 6
    sharded = plan_of("shard", *METHODS["shard"])
    assert sharded.before == (-1, -1, 0, 1)
    assert sharded.reduces == {0, 1}
    assert sharded.reducing == 2


@pytest.mark.parametrize(
    ("numel", "ranks", "itemsize", "at"),
    [
        (96, 3, 4, [0, 32, 64, 96]),
        (100, 3, 4, [0, 48, 96, 100]),  # parts of whole 64 bytes, 16 elements; the last is shorter
        (100, 3, 2, [0, 64, 100, 100]),
        (5, 2, 8, [0, 5, 5]),
        (0, 2, 4, [0, 0, 0]),
    ],
)
def test_parts_of_a_slice(numel: int, ranks: int, itemsize: int, at: list[int]):
    assert borders(numel, ranks, itemsize) == at
