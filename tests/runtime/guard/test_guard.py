"""Whatever reads a tensor in flight waits for it."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import soonest
from helpers import reads, writes
from helpers.flights import Found, fly
from helpers.ranks import run_ranks
from helpers.steering import keep_to_the_usual_plan
from soonest.runtime.guard import module_hooks, pending, transforms

SAFETY = Path(__file__).parents[3] / "docs" / "safety.md"

READERS: dict[str, Callable[[Any], Any]] = {
    "arithmetic": lambda p: p * 2,
    "reflected arithmetic": lambda p: 1 - p,
    "matmul": lambda p: p @ p,
    "in place": lambda p: p.detach().add_(1),
    "comparison": lambda p: p == 1,
    "indexing": lambda p: p[0],
    "item": lambda p: p[0, 0].item(),
    "iteration": lambda p: list(p),
    "tolist": lambda p: p.tolist(),
    "repr": repr,
    "format": lambda p: f"{p}",
    "bool": lambda p: bool(p.detach().sum()),
    "float": lambda p: float(p.detach().sum()),
    "contains": lambda p: 1.0 in p,
    "numpy": lambda p: p.detach().numpy(),
    "numpy by force": lambda p: p.numpy(force=True),
    "asarray": lambda p: np.asarray(p.detach()),
    "dlpack": lambda p: torch.utils.dlpack.to_dlpack(p.detach()),
    "data": lambda p: p.data,
    "detach": lambda p: p.detach(),
    "clone": lambda p: p.clone(),
    "to": lambda p: p.to(torch.float64),
    "type": lambda p: p.half(),
    "cpu": lambda p: p.cpu(),
    "data_ptr": lambda p: p.data_ptr(),
    "storage": lambda p: p.untyped_storage(),
    "view": lambda p: p.view(-1),
    "transpose": lambda p: p.T,
    "version": lambda p: p._version,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "save": lambda p: torch.save(p, io.BytesIO()),
    "save in a dict": lambda p: torch.save({"p": p}, io.BytesIO()),
    "linear": lambda p: F.linear(torch.ones(1, 3), p),
    "keyword": lambda p: F.linear(torch.ones(1, 3), weight=p),
    "embedding": lambda p: F.embedding(torch.tensor([0]), p),
    "layer_norm": lambda p: F.layer_norm(torch.ones(3, 3), (3, 3), p),
    "einsum": lambda p: torch.einsum("ij->i", p),
    "cat": lambda p: torch.cat([p, p]),
    "stack in a tuple": lambda p: torch.stack((p,)),
    "out": lambda p: torch.add(torch.ones(3, 3), 1, out=torch.empty(3, 3)).copy_(p),
    "foreach": lambda p: torch._foreach_add([p.detach()], 1),
    "foreach lerp": lambda p: torch._foreach_lerp([torch.zeros(3, 3)], [p], 0.5),
    "copy from": lambda p: torch.zeros(3, 3).copy_(p),
    "norm": lambda p: p.norm(),
    "norm of all": lambda p: nn.utils.get_total_norm([p]),
    "vector": lambda p: nn.utils.parameters_to_vector([p]),
    "where": lambda p: torch.where(p > 0, p, p),
    "allclose": lambda p: torch.allclose(p, p),
    "vmap": lambda p: torch.func.vmap(torch.sum)(p),
    "init": lambda p: nn.init.zeros_(p),
    "share memory": lambda p: p.is_set_to(p),
}

WHAT_IT_IS: dict[str, Callable[[Any], Any]] = {
    "shape": lambda p: p.shape,
    "size": lambda p: p.size(0),
    "len": len,
    "numel": lambda p: p.numel(),
    "dtype": lambda p: p.dtype,
    "device": lambda p: p.device,
    "requires_grad": lambda p: p.requires_grad,
    "is_leaf": lambda p: p.is_leaf,
    "is floating": lambda p: p.is_floating_point(),
    "grad": lambda p: p.grad,
    "setting grad": lambda p: setattr(p, "grad", None),
    "hash": hash,
    "identity": lambda p: p is p,
    "isinstance": lambda p: isinstance(p, nn.Parameter),
    "freeze": lambda p: p.requires_grad_(True),
}


class Flight:
    """A parameter in flight that counts how often it was asked to land."""

    def __init__(self) -> None:
        self.parameter = nn.Parameter(torch.zeros(3, 3))
        self.landings = 0
        self.hold = pending.PendingTensor(self.parameter, self.wait)
        self.hold.mark_pending()

    def wait(self) -> None:
        self.landings += 1
        self.parameter.data.fill_(1.0) if not pending.is_pending(self.parameter) else None


@pytest.fixture
def flight() -> Iterator[Flight]:
    flying = Flight()
    yield flying
    flying.hold.release()


@pytest.mark.parametrize("reader", READERS)
def test_reading_waits_once(reader: str, flight: Flight) -> None:
    READERS[reader](flight.parameter)
    assert flight.landings == 1
    assert type(flight.parameter) is nn.Parameter
    READERS[reader](flight.parameter)
    assert flight.landings == 1


@pytest.mark.parametrize("reader", WHAT_IT_IS)
def test_asking_what_it_is_does_not_wait(reader: str, flight: Flight) -> None:
    WHAT_IT_IS[reader](flight.parameter)
    assert flight.landings == 0
    assert pending.is_pending(flight.parameter)


def test_a_module_lands_its_own_parameters_only() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    landed: list[str] = []
    holds = [
        pending.PendingTensor(parameter, lambda name=name: landed.append(name))
        for name, parameter in model.named_parameters()
    ]
    for hold in holds:
        hold.mark_pending()
    module_hooks.wait_module(model[1])
    assert landed == ["1.weight", "1.bias"]
    for hold in holds:
        hold.release()


def test_a_held_gradient_is_zeroed_without_waiting() -> None:
    asked: list[str] = []
    held, free = torch.ones(2), torch.ones(2)
    hold = pending.PendingTensor(
        held, lambda: asked.append("land"), zero=lambda: asked.append("zero")
    )
    hold.mark_pending()
    assert held.zero_() is held
    torch._foreach_zero_([held, free])
    assert asked == ["zero", "zero"]
    assert free.tolist() == [0, 0]
    hold.release()


def test_zeroing_a_parameter_waits() -> None:
    flying = Flight()
    with torch.no_grad():
        flying.parameter.zero_()
    assert flying.landings == 1


def test_grad_waits_where_it_is_unknown() -> None:
    parameter = nn.Parameter(torch.ones(2))
    landed: list[str] = []
    hold = pending.PendingTensor(parameter, lambda: landed.append("land"))
    hold.hides_grad = True
    hold.mark_pending()
    assert parameter.grad is None
    assert landed == ["land"]


def test_a_copy_is_not_in_flight(flight: Flight) -> None:
    twin = copy.deepcopy(flight.parameter)
    assert type(twin) is nn.Parameter
    assert not pending.is_pending(twin)


def test_the_guard_can_be_told_off_for_a_while(flight: Flight) -> None:
    with pending.DisableGuard():
        assert isinstance(flight.parameter + 1, Tensor)
    assert flight.landings == 0


def compiled_transforms() -> bool:
    """Whether what is done to ``torch.func`` leaves compiled functions whole."""
    transforms.wait_first()
    compiled: Any = torch.compile(torch.func.grad(reads.cubes), backend="eager", fullgraph=True)
    x = torch.linspace(-1, 1, 5)
    return torch.allclose(compiled(x), 3 * x * x)


def test_transforms_are_compiled_as_a_whole() -> None:
    assert run_ranks(compiled_transforms, 1) == [True]


def flies_beside_a_view() -> list[Any]:
    """Whether a parameter is in flight after a step: before, while and after it has a view."""
    keep_to_the_usual_plan()
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    handle = soonest.prioritize(model, optimizer)
    said: list[str] = []
    log, listener = logging.getLogger("soonest"), logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())

    def step() -> bool:
        optimizer.zero_grad()
        loss = model(torch.randn(3, 4)).square().sum()
        loss.backward()
        optimizer.step()
        return pending.is_pending(model[0].weight)

    while not handle.settled:
        step()
    log.setLevel(logging.INFO)
    log.addHandler(listener)
    found: list[Any] = [step(), step()]
    view = model[0].weight.data[1]
    found += [step(), step()]
    del view
    found += [step(), step(), said]
    return found


def test_what_has_a_view_is_updated_in_the_step_and_told_once() -> None:
    for *flies, said in run_ranks(flies_beside_a_view, 2):
        assert flies == [True, True, False, False, True, True]
        (sentence,) = said
        assert sentence.startswith("0.weight is updated inside optimizer.step(), because another")


GUARDED = [
    *(("reads", name) for name in reads.READS),
    *(("kept", name) for name in reads.KEPT),
    *(("gradient reads", name) for name in reads.GRADIENT_READS),
    *(("writes", name) for name in writes.WRITES),
    *(("gradient writes", name) for name in writes.GRADIENT_WRITES),
    *(("moves", name) for name in writes.MOVES),
]
# Without the guard these would come out right as well: nothing that could be stale is read.
HARMLESS = [
    *(("replaced", name) for name in writes.REPLACED),
    *(("replaced later", name) for name in writes.REPLACED),
]


@pytest.fixture(scope="module")
def guarded() -> list[Found]:
    return run_ranks(fly, 2, True)


@pytest.fixture(scope="module")
def unguarded() -> list[Found]:
    return run_ranks(fly, 2, False)


@pytest.mark.parametrize(("kind", "way"), [*GUARDED, *HARMLESS])
def test_nothing_in_the_middle_of_overlap_is_stale_or_lost(
    kind: str, way: str, guarded: list[Found]
) -> None:
    assert [rank[kind][way] for rank in guarded] == [False, False]


@pytest.mark.parametrize(("kind", "way"), GUARDED)
def test_without_the_guard_the_same_is_stale_or_lost(
    kind: str, way: str, unguarded: list[Found]
) -> None:
    assert [rank[kind][way] for rank in unguarded] == [True, True]


@pytest.mark.parametrize("way", reads.HOLES)
def test_what_the_guard_cannot_see_is_documented(way: str, guarded: list[Found]) -> None:
    assert [rank["holes"][way] for rank in guarded] == [True, True]
    assert way in SAFETY.read_text()
