"""What is told of a step that has come to an end in the middle."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from soonest.runtime.engine.detach import undone
from soonest.runtime.execute.pass_state import GATHERED, REDUCED, UPDATED, BucketState

NAMES = "abcde"


def _state(sharded: bool, updated: str, shared: str) -> BucketState:
    if updated == "1":
        return GATHERED if sharded else UPDATED
    return UPDATED if shared == "1" else REDUCED


def told(*, sharded: bool, updated: str, shared: str = "0000", step: bool = True) -> str:
    """What is undone of a plan with four buckets, of which the last two carry parts of ``d``.

    Args:
        sharded: each rank updates parts.
        updated: per bucket, a 1 where its parameters have their values.
        shared: per bucket, a 1 where this rank has updated its part, at least.
        step: there was one.
    """
    params = [SimpleNamespace(name=name, order=order) for order, name in enumerate(NAMES[:4])]
    call = SimpleNamespace(gradients=dict.fromkeys(range(4)))
    pass_state = SimpleNamespace(
        number=7,
        step=call if step else None,
        plan=SimpleNamespace(sharded=sharded),
        states=[_state(sharded, *marks) for marks in zip(updated, shared, strict=True)],
        final=GATHERED if sharded else UPDATED,
    )
    bound: Any = SimpleNamespace(
        unfinished={1: pass_state}.values(),
        layout=SimpleNamespace(params=params),
        buckets_of=[[0], [0], [1], [2, 3]],
        last_of=[0, 0, 1, 3],
    )
    return undone(bound)


def test_nothing_is_undone_where_all_is_updated_or_no_step_was_made() -> None:
    assert told(sharded=False, updated="1111") == ""
    assert told(sharded=False, updated="0000", step=False) == ""


def test_what_lacks_an_update_is_named() -> None:
    assert told(sharded=False, updated="1011") == "'c' lacks the update of step 7"
    assert told(sharded=False, updated="1110") == "'d' lacks the update of step 7"
    assert told(sharded=False, updated="1101") == "", "its last bucket counts"
    assert told(sharded=False, updated="0111") == "'a', 'b' lack the update of step 7"
    assert told(sharded=False, updated="0000") == (
        "'a', 'b', 'c' and 1 more lack the update of step 7"
    )


def test_what_has_only_a_part_of_its_values_is_named() -> None:
    assert told(sharded=True, updated="1110", shared="1111") == (
        "'d' in part has the values of step 7"
    )
    assert told(sharded=True, updated="1110") == "'d' in part has the values of step 7"
    assert told(sharded=True, updated="0000", shared="1000") == (
        "'a', 'b' in part have the values of step 7 and 'c', 'd' lack the update of step 7"
    )
    assert told(sharded=True, updated="1111", shared="1111") == ""
