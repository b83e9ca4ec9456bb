"""Faults at the worst moments: in the middle of an op, in a wait, at the end of a process."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import soonest
from helpers.failing import (
    ODD,
    SHORT_S,
    Run,
    Runs,
    Said,
    backward,
    end,
    error_of,
    in_training,
    left,
    model_and_optimizer,
    odd,
    started,
    steps,
    told,
)
from helpers.ranks import say_done, wait_for_the_others
from soonest import PeerLostError, PlanMismatchError
from soonest.runtime.comm import groups, ops

_LATE_S = 6.0
"""After the time-out everything has ended, and it is known who is at fault."""


def dies(*_: Any, **__: Any) -> Any:
    end("killed")


def shared(method: str = "shard", timeout_s: float | None = None) -> tuple[Any, Any, Any]:
    model, optimizer = model_and_optimizer()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    handle = soonest.prioritize(
        model, optimizer, shard_optimizer=True, method=method, timeout_s=timeout_s
    )
    steps(model, optimizer, 7)
    return model, optimizer, handle


# A rank dies in the middle of an op


def killed_in_a_ring() -> tuple[Said, ...]:
    model, optimizer, handle = shared()
    handle.flush()
    dist.barrier()
    if odd():
        ops.send = dies
    return told(error_of(steps, model, optimizer, 1000), error_of(handle.detach))


def torn() -> tuple[Said, Said, list[str], int, bool]:
    """A rank dies when gradients are summed, and before its part of the parameters is shared."""
    model, optimizer, handle = shared()
    handle.flush()
    dist.barrier()
    if odd():
        ops._OPS["all_gather_parameters"] = dies
    warnings = _Kept()
    logging.getLogger("soonest").addHandler(warnings)
    raised = error_of(steps, model, optimizer, 1000)
    detached = error_of(handle.detach)
    parts = handle.local_optimizer_state()
    plain = all(type(p) is nn.Parameter and p.isfinite().all() for p in model.parameters())
    say_done()
    return raised, detached, warnings.texts, len(parts), plain


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def first_noticed_in_detach(sharded: bool) -> tuple[Said, Said, bool, int]:
    model, optimizer, handle = in_training(shard_optimizer=sharded)
    if odd():
        end("killed")
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    first, second = error_of(handle.detach), error_of(handle.detach)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    backward(model)
    optimizer.step()  # alone
    changed = sum(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    say_done()
    return first, second, type(optimizer) is torch.optim.SGD, changed


# A rank that only is late, and what has no limit of its own


def late_beside_a_stopped_one() -> tuple[Said, ...] | None:
    model, optimizer, _handle = in_training(timeout_s=SHORT_S)
    if odd():
        end("stops")
    if dist.get_rank() == 2:
        time.sleep(SHORT_S + 2)
    return told(error_of(steps, model, optimizer, 1000))


def nothing_is_started() -> tuple[Said, ...]:
    """A wait of which no op's own time-out can tell."""
    model, _optimizer, handle = in_training(timeout_s=SHORT_S)
    if odd():
        handle.engine.lane._passes.next_op = lambda: None  # type: ignore[union-attr]
    backward(model)
    found = error_of(handle.flush)
    say_done()
    wait_for_the_others()
    return (found,)


def time_outs() -> list[float]:
    """Of the group, of one that is made with another, and as they are asked for."""
    found: list[float] = []
    patient = dist.new_group(timeout=timedelta(hours=2))
    for group, timeout_s in ((None, None), (patient, None), (patient, 3.0)):
        handle = soonest.prioritize(
            *model_and_optimizer(), process_group=group, timeout_s=timeout_s
        )
        assert handle.engine is not None
        found.append(groups.timeout_of(handle.engine.ranks.group))
        found.append(groups.timeout_of(handle.engine.ranks.second))
        found.append(handle.engine.lane._timeout_s)  # type: ignore[attr-defined]
        handle.detach()
    return found


def sleeps_beyond_the_groups_time_out() -> tuple[Said, ...] | None:
    model, optimizer = model_and_optimizer()
    soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    if odd():
        end("sleeps")
        return None
    return told(error_of(steps, model, optimizer, 1000))


# An error of the user's in a wait of ours


def interrupted_in_a_wait() -> tuple[Said, ...]:
    *_, handle = shared(timeout_s=20.0)
    handle.flush()
    dist.barrier()

    def handler(*_: Any) -> None:
        raise RuntimeError("a worker was killed")

    if odd():
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        found = error_of(handle.optimizer_state_dict)
    else:
        if dist.get_rank() == 0:
            time.sleep(2)
        found = error_of(handle.optimizer_state_dict)
    say_done()
    wait_for_the_others()
    return (found,)


# The first rank has the key-value store, and ends


def ends_with_the_store(how: str) -> tuple[Said, ...] | None:
    model, optimizer, _handle = in_training()
    if dist.get_rank() == 0:
        end(how)
    return (error_of(steps, model, optimizer, 1000),)


# The drop-in class


def wrapped() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    return soonest.DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1)


def killed_beside_wrapped_buffers() -> tuple[Said, ...]:
    net, optimizer = wrapped()
    steps(net, optimizer, 7)
    net.module[0].weight.grad.sum()
    dist.barrier()
    if odd():
        end("killed")
    return told(error_of(steps, net, optimizer, 1000))


def killed_in_the_constructor() -> tuple[Said, ...]:
    from torch.nn.parallel import distributed as theirs

    if odd():
        theirs._sync_module_states = dies
    return told(error_of(wrapped))


def refused_by_the_constructor() -> Said:
    torch.manual_seed(0)
    given = {"mixed_precision": object()} if odd() else {}
    return error_of(soonest.DistributedDataParallel, nn.Linear(3, 3), **given)


def another_wrapped_model(what: str) -> Said:
    model = nn.Linear(3 + (odd() and what == "trained"), 3)
    size = 4 + odd()
    if what == "buffer":
        model.register_buffer("seen", torch.zeros(size))
    if what == "frozen":
        model.frozen = nn.Parameter(torch.zeros(size), requires_grad=False)
    return error_of(soonest.DistributedDataParallel, model)


# What ranks must have alike


def another_tensor(what: str) -> Said:
    model, optimizer = model_and_optimizer()
    size = 4 + odd()
    if what == "buffer":
        model.register_buffer("seen", torch.zeros(size))
    if what == "frozen":
        model.frozen = nn.Parameter(torch.zeros(size), requires_grad=False)
    if what == "missing" and odd():
        model.register_buffer("seen", torch.zeros(size))
    return error_of(soonest.prioritize, model, optimizer)


def another_setting(what: str) -> Said:
    model, _ = model_and_optimizer()
    if what == "groups":
        parts = [model[0].parameters(), model[2].parameters()]
        if odd():
            parts.reverse()
        optimizer = torch.optim.SGD([{"params": list(part)} for part in parts], lr=0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        rate = 0.2 if odd() else 0.1
        optimizer.param_groups[0]["lr"] = torch.tensor(rate) if what == "tensor" else rate
    return error_of(soonest.prioritize, model, optimizer)


def another_state(what: str) -> tuple[Said, Said]:
    model, optimizer = model_and_optimizer()
    handle = soonest.prioritize(model, optimizer)
    steps(model, optimizer, 2)
    state = handle.state_dict()
    if odd():
        if what == "missing":
            del state["model"]["2.weight"]
        elif what == "shape":
            state["model"]["2.weight"] = torch.zeros(3, 3)
        elif what == "part":
            del state["optim"]
        else:
            state["optim"]["param_groups"] = "damaged"
    before = [p.detach().clone() for p in model.parameters()]
    found = error_of(handle.load_state_dict, state)
    if what != "damaged":
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    return found, error_of(steps, model, optimizer, 3)


RUNS = {
    "killed in a ring": Run(killed_in_a_ring, 3),
    "torn": Run(torn, 3),
    "first noticed in detach": Run(first_noticed_in_detach, 3, (False,)),
    "first noticed in detach, sharded": Run(first_noticed_in_detach, 3, (True,)),
    "late beside a stopped one": Run(late_beside_a_stopped_one, 3),
    "nothing is started": Run(nothing_is_started, 3),
    "time-outs": Run(time_outs, 2, (), 40.0),
    "sleeps": Run(sleeps_beyond_the_groups_time_out, 3, (), SHORT_S),
    "interrupted in a wait": Run(interrupted_in_a_wait, 3),
    "the store's rank leaves": Run(ends_with_the_store, 3, ("leaves",), 20.0, True),
    "the store's rank is killed": Run(ends_with_the_store, 3, ("killed",), 20.0, True),
    "killed beside wrapped buffers": Run(killed_beside_wrapped_buffers, 3),
    "killed in the constructor": Run(killed_in_the_constructor, 3),
    "refused by the constructor": Run(refused_by_the_constructor, 3),
    **{
        f"wrapped {w}": Run(another_wrapped_model, 3, (w,)) for w in ("trained", "buffer", "frozen")
    },
    **{f"other {w}": Run(another_tensor, 3, (w,)) for w in ("buffer", "frozen", "missing")},
    **{f"other {w}": Run(another_setting, 3, (w,)) for w in ("rate", "tensor", "groups")},
    **{f"state {w}": Run(another_state, 3, (w,)) for w in ("missing", "shape", "part", "damaged")},
}


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    yield from started(RUNS)


def test_a_rank_that_dies_while_a_sum_goes_round_is_named_at_once(runs: Runs) -> None:
    results = runs["killed in a ring"].result()
    assert results[ODD] is None
    for raised, detached in (results[0], results[2]):
        assert raised.name == PeerLostError.__name__
        assert raised.message.startswith("step 7: bucket ")
        assert "rank 1 (host " in raised.message
        assert "rank 0 (" not in raised.message
        assert "rank 2 (" not in raised.message
        assert raised.took_s < 5
        assert detached.name == ""
        assert detached.took_s < 5


def test_parameters_of_which_only_a_part_has_changed_are_named(runs: Runs) -> None:
    results = runs["torn"].result()
    assert results[ODD] is None
    for raised, detached, warnings, parts, plain in (results[0], results[2]):
        assert raised.name == PeerLostError.__name__
        assert detached.name == ""
        (warning,) = warnings
        assert "in part has the values of step 7" in warning or "in part have the" in warning
        assert "handle.local_optimizer_state()" in warning
        assert parts
        assert plain


@pytest.mark.parametrize("sharded", ["", ", sharded"])
def test_detach_leaves_plain_objects_before_it_says_what_failed(sharded: str, runs: Runs) -> None:
    results = runs["first noticed in detach" + sharded].result()
    assert results[ODD] is None
    for first, second, own_class, changed in (results[0], results[2]):
        assert first.name == PeerLostError.__name__
        assert "rank 1 (host " in first.message
        assert ("local_optimizer_state" in first.message) == bool(sharded)
        assert second.name == ""
        assert own_class
        assert changed == 4


def test_who_is_late_is_told_from_who_is_lost(runs: Runs) -> None:
    results = runs["late beside a stopped one"].result()
    (first,) = results[0]
    assert "rank 1 (host " in first.message
    assert "has not answered within 4 s" in first.message
    assert "rank 2 (" not in first.message
    assert first.took_s < SHORT_S + _LATE_S


def test_a_wait_in_which_nothing_moves_ends(runs: Runs) -> None:
    for (said,) in runs["nothing is started"].result():
        assert said.name in ("PeerLostError", "SoonestError")
        assert said.message.startswith("step 7: bucket ")
        assert said.took_s < SHORT_S + _LATE_S
        assert (said.name == "PeerLostError") == ("rank " in said.message)


def test_the_groups_own_time_out_holds_unless_another_is_asked_for(runs: Runs) -> None:
    for found in runs["time-outs"].result():
        assert found == [40.0] * 3 + [7200.0] * 3 + [3.0] * 3


def test_a_rank_that_sleeps_is_named_after_the_groups_time_out(runs: Runs) -> None:
    for said in left(runs["sleeps"].result()):
        assert said.name == PeerLostError.__name__
        assert "rank 1 (host " in said.message
        assert "did not take part: it is behind optimizer.step() of step 6" in said.message
        assert SHORT_S / 2 < said.took_s < SHORT_S + _LATE_S


def test_what_a_signal_handler_raises_is_nobody_elses_fault(runs: Runs) -> None:
    for rank, (said,) in enumerate(runs["interrupted in a wait"].result()):
        if rank == ODD:
            assert said[:2] == ("RuntimeError", "a worker was killed")
        else:
            assert said.name == PeerLostError.__name__
            assert "rank 1 (host " in said.message
            assert "failed: RuntimeError: a worker was killed" in said.message
        assert said.took_s < 10


@pytest.mark.parametrize("how", ["leaves", "is killed"])
def test_the_rank_that_takes_the_store_with_it_is_named(how: str, runs: Runs) -> None:
    results = runs[f"the store's rank {how}"].result()
    assert results[0] is None
    for (said,) in results[1:]:
        assert said.name == PeerLostError.__name__
        assert "rank 0 (host " in said.message
        assert "did not take part" in said.message
        assert "rank 1 (host " not in said.message
        assert "rank 2 (host " not in said.message


@pytest.mark.parametrize("where", ["beside wrapped buffers", "in the constructor"])
def test_the_drop_in_class_names_who_is_lost(where: str, runs: Runs) -> None:
    for said in left(runs[f"killed {where}"].result()):
        assert said.name == PeerLostError.__name__
        assert "rank 1 (host " in said.message
        assert "did not take part" in said.message
        assert said.took_s < 10


def test_what_the_constructor_refuses_on_one_rank_it_refuses_on_all(runs: Runs) -> None:
    for rank, said in enumerate(runs["refused by the constructor"].result()):
        assert said.name == ValueError.__name__
        assert said.message.startswith("" if rank == ODD else "rank 1: ")
        assert "mixed_precision was given" in said.message


OTHERS = {
    "wrapped trained": "parameter 0 is weight (3, 3)",
    "wrapped buffer": "buffer 'seen' is (4,) torch.float32 on ranks 0 and 2, (5,)",
    "wrapped frozen": "frozen parameter 'frozen' is (4,) torch.float32 on ranks 0 and 2, (5,)",
    "other buffer": "buffer 'seen' is (4,) torch.float32 on ranks 0 and 2, (5,)",
    "other frozen": "frozen parameter 'frozen' is (4,) torch.float32 on ranks 0 and 2, (5,)",
    "other missing": "buffer 'seen' is missing on ranks 0 and 2, (5,) torch.float32 on rank 1",
    "other rate": "lr in group 0 is 0.1 on ranks 0 and 2, 0.2 on rank 1",
    "other tensor": "lr in group 0 is 0.1",
    "other groups": "what is trained in group 0 is 0.weight, 0.bias on ranks 0 and 2, 2.weight",
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_differs_is_named_on_all_ranks(what: str, runs: Runs) -> None:
    for said in runs[what].result():
        assert said.name == PlanMismatchError.__name__
        assert OTHERS[what] in said.message
        assert "rank 1" in said.message


@pytest.mark.parametrize("what", ["missing", "shape", "part", "damaged"])
def test_a_state_is_taken_by_all_ranks_or_by_none(what: str, runs: Runs) -> None:
    for rank, (said, after) in enumerate(runs[f"state {what}"].result()):
        assert said.name
        assert rank == ODD or said.message.startswith("rank 1: ")
        assert said.took_s < 10
        assert what == "damaged" or after.name == ""
