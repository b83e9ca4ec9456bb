"""soonest can be taken away again: nothing of it is left, and training goes on."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import lr_scheduler

import soonest
from helpers.equal import equal
from helpers.ranks import run_ranks
from helpers.reads import reloaded
from soonest.runtime.guard import pending


class Training:
    """A model with all that a loop has beside it; two schedulers, made before and after.

    Args:
        prioritized: with soonest.
        options: of ``prioritize``.
    """

    def __init__(self, *, prioritized: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(8, 200),
            nn.Conv1d(1, 2, 3, bias=False).to(memory_format=torch.contiguous_format),
            nn.LSTM(198, 6, batch_first=True),
        )
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others}]
        self.optimizer = torch.optim.Adam(groups, lr=1e-2)
        self.schedulers: list[Any] = [lr_scheduler.StepLR(self.optimizer, 3)]
        self.handle = (
            soonest.prioritize(self.model, self.optimizer, **options) if prioritized else None
        )
        self.schedulers.append(lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.9**step))

    def steps(self, numbers: range, *, schedule_last: bool = True) -> None:
        """The data depend on the rank, and on the number of the step."""
        for number in numbers:
            noise = torch.Generator().manual_seed(100 * number + dist.get_rank())
            x = torch.randn(3, 1, 8, generator=noise)
            self.optimizer.zero_grad()
            for module in self.model:
                x = module(x)
            x[0].square().mean().backward()
            self.optimizer.step()
            for scheduler in self.schedulers:
                scheduler.step()

    def state(self) -> Any:
        """All numbers that training depends on."""
        return copy.deepcopy(
            (
                self.model.state_dict(),
                self.optimizer.state_dict(),
                [scheduler.state_dict() for scheduler in self.schedulers],
            )
        )

    def take(self, state: Any) -> None:
        model, optimizer, schedulers = copy.deepcopy(state)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        for scheduler, values in zip(self.schedulers, schedulers, strict=True):
            scheduler.load_state_dict(values)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared out": {"shard_optimizer": True},
    "rounded": {"shard_optimizer": True, "parameter_wire_dtype": torch.bfloat16},
    "at once": {"separable": False},
}


def detaches_in_flight() -> dict[str, dict[str, bool]]:
    """What is so after ``detach()`` right behind a step, by way of prioritizing."""
    found: dict[str, dict[str, bool]] = {}
    for name, options in OPTIONS.items():
        run, alone = Training(**options), Training(prioritized=False)
        cls = torch.optim.Adam
        run.steps(range(9))
        assert run.handle
        run.handle.detach()
        state = run.state()
        alone.take(state)
        plain = {
            "parameters": all(type(p) is nn.Parameter for p in run.model.parameters()),
            "gradients": all(type(p.grad) is Tensor for p in run.model.parameters()),
            "hooks of parameters": not any(
                p._backward_hooks or p._post_accumulate_grad_hooks for p in run.model.parameters()
            ),
            "hooks of modules": not any(
                m._forward_pre_hooks or m._forward_hooks for m in run.model.modules()
            ),
            "memory": all(
                t.untyped_storage().nbytes() == t.nbytes and t.untyped_storage().resizable()
                for p in run.model.parameters()
                for t in (p, p.grad)
                if t is not None
            ),
            "optimizer": type(run.optimizer) is cls and "taken_from" not in dir(run.optimizer),
            "nothing held": not any(pending.is_pending(p) for p in run.model.parameters()),
            "handle": run.handle.plan is None and run.handle.history == (),
        }
        twin, twins_optimizer = pickle.loads(pickle.dumps((run.model, run.optimizer)))
        plain["pickle"] = equal(twin.state_dict(), state[0])
        plain["pickle of the optimizer"] = equal(twins_optimizer.state_dict(), state[1])
        plain["save"] = equal(reloaded(run.model).state_dict(), state[0])
        plain["deepcopy"] = equal(copy.deepcopy(run.model).state_dict(), state[0])
        other = copy.deepcopy(run.model).to(torch.float64)
        plain["to"] = all(p.dtype is torch.float64 for p in other.parameters())
        run.steps(range(9, 14))
        alone.steps(range(9, 14))
        plain["the same numbers alone"] = equal(run.state(), alone.state())
        moments = len(run.optimizer.state) == len(list(run.model.parameters()))
        plain["whole state"] = moments
        again = soonest.prioritize(run.model, run.optimizer)
        run.steps(range(14, 17))
        again.detach()
        plain["prioritized again"] = all(p.isfinite().all() for p in run.model.parameters())
        found[name] = plain
    return found


@pytest.fixture(scope="module")
def detached() -> list[dict[str, dict[str, bool]]]:
    return run_ranks(detaches_in_flight, 2)


@pytest.mark.parametrize("options", OPTIONS)
def test_detach_in_the_middle_of_overlap_leaves_plain_objects(
    options: str, detached: list[dict[str, dict[str, bool]]]
) -> None:
    for rank in detached:
        wrong = [what for what, right in rank[options].items() if not right]
        assert not wrong


# Dropped without detach()


def drop(when: str) -> tuple[list[str], list[str]]:
    """What is still there when nobody refers to model, optimizer and handle any more."""
    before = set(threading.enumerate())
    run = Training(shard_optimizer=when == "shared out")
    run.steps(range(7))
    assert run.handle
    assert run.handle.engine
    if when == "in the backward pass":
        run.model[0](torch.ones(3, 8)).sum().backward()
    if when == "landed":
        run.handle.flush()
    if when == "a gradient is kept":
        kept = run.model[0].weight.grad
        assert kept is not None
    watched = {
        "engine": run.handle.engine,
        "model": run.model,
        "optimizer": run.optimizer,
        "parameter": run.model[0].weight,
        "buffer": run.handle.engine.layout.grads[0],
        "lane": run.handle.engine.lane,
    }
    refs = {name: weakref.ref(value) for name, value in watched.items()}
    del run, watched
    deadline = time.monotonic() + 30
    while True:
        gc.collect()
        alive = [name for name, ref in refs.items() if ref() is not None]
        threads = [t.name for t in set(threading.enumerate()) - before if "soonest" in t.name]
        if not (alive or threads) or time.monotonic() > deadline:
            return alive, threads
        time.sleep(0.05)


WHENS = ("in flight", "shared out", "landed", "in the backward pass")


def drops() -> dict[str, tuple[list[str], list[str]]]:
    found = {when: drop(when) for when in WHENS}
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def dropped() -> list[dict[str, tuple[list[str], list[str]]]]:
    return run_ranks(drops, 2)


@pytest.mark.parametrize("when", WHENS)
def test_what_is_dropped_is_collected_and_its_threads_end(
    when: str, dropped: list[dict[str, tuple[list[str], list[str]]]]
) -> None:
    assert [rank[when] for rank in dropped] == [([], [])] * 2


# What is saved, pickled or shared of a prioritized model is no more than without soonest


def sizes() -> list[int]:
    model = nn.Sequential(*(nn.Linear(50, 50) for _ in range(10)))
    plain = len(pickle.dumps(model))
    soonest.prioritize(model, torch.optim.SGD(model.parameters(), lr=0.1))
    file = io.BytesIO()
    torch.save(model[0].weight, file)
    return [plain, len(pickle.dumps(model)), 4 * 50 * 50, len(file.getvalue())]


def test_a_part_of_a_model_can_be_saved_without_the_rest() -> None:
    for plain, prioritized, weight, saved in run_ranks(sizes, 2):
        assert prioritized < 1.2 * plain
        assert weight < saved < 1.5 * weight
