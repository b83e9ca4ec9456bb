"""Ranks meet in a key-value store that has seen others before them, as torchrun keeps one."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as dist

import soonest
from helpers.failing import model_and_optimizer, steps
from helpers.ranks import run_ranks
from soonest.runtime.comm import groups, rendezvous

LIMIT_S = 30.0


def meet(store: Any, ranks: int, timeout_s: float = LIMIT_S) -> list[str | list[int]]:
    """By rank, the word of those that met, or who has not come; the first ``ranks`` of three do."""
    found: dict[int, str | list[int]] = {}

    def come(rank: int) -> None:
        meeting = rendezvous.Rendezvous(store, rank, 3)
        try:
            found[rank] = meeting.wait(timeout_s)
        except RuntimeError:
            found[rank] = meeting.missing()

    threads = [threading.Thread(target=come, args=(rank,)) for rank in reversed(range(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LIMIT_S)
    return [found[rank] for rank in range(ranks)]


def test_all_that_meet_know_one_word_which_is_new_each_time() -> None:
    store = dist.HashStore()
    words = [meet(store, 3) for _ in range(4)]
    assert all(len(set(map(str, each))) == 1 for each in words)
    assert len({str(each[0]) for each in words}) == len(words)


def test_those_of_an_earlier_meeting_do_not_count() -> None:
    store = dist.HashStore()
    meet(store, 3)
    assert meet(store, 2, timeout_s=0.3) == [[2], [2]]


def test_who_comes_without_the_first_does_not_take_an_earlier_one_for_it() -> None:
    store = dist.HashStore()
    meet(store, 3)
    second = rendezvous.Rendezvous(store, 1, 3)
    with pytest.raises(RuntimeError, match="waited 0 s for all to come"):
        second.wait(0.2)
    assert second.missing() == [0]


def test_a_meeting_that_was_broken_off_does_not_count() -> None:
    """As when a rank is lost while all start; then all are started anew."""
    store = dist.HashStore()
    meet(store, 2, timeout_s=0.1)
    words = meet(store, 3)
    assert isinstance(words[0], str)
    assert len(set(map(str, words))) == 1


def keys() -> tuple[set[str], set[str]]:
    """All that are in the store before training by priority, and what that adds."""
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    before = set(store.list_keys())
    dist.barrier()
    model, optimizer = model_and_optimizer()
    handle = soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    assert handle.engine is not None
    assert groups.has_own_store(handle.engine.ranks.second)
    handle.engine.failures.tell("no more")
    dist.barrier()
    return before, set(store.list_keys()) - before


def test_all_keys_but_those_of_the_meeting_hold_its_word() -> None:
    """Also those by which torch connects our groups, and the notes of ranks that give up."""
    for _, added in run_ranks(keys, 2):
        meetings = [key for key in added if key.rpartition("/")[2] == "first"]
        assert len(meetings) == 1
        where = meetings[0].removesuffix("first")
        inside = [key.removeprefix(where) for key in added]
        words = {key.partition("/")[0] for key in inside} - {"first"}
        assert len(words) == 1, added
        assert any("/failed/" in key for key in added), added
        assert len(added) > 10, "groups have connected"


def left_notes() -> str:
    """What a rank raises where one has failed before the ranks were started anew."""
    model, _ = model_and_optimizer()
    group = dist.group.WORLD
    assert group is not None
    name = f"soonest/{group.group_name}/1/failed"
    store = groups.store_of(group)
    for key, note in ((name, "yes"), (f"{name}/0", "!boom"), (f"{name}/1", "!boom")):
        store.set(key, note)
    dist.barrier()
    net = soonest.DistributedDataParallel(model)
    failures = net._failures
    assert failures is not None
    return str(failures.blame("the test", False))


def test_notes_of_ranks_before_a_restart_are_nobodys() -> None:
    assert run_ranks(left_notes, 2) == ["None", "None"]
