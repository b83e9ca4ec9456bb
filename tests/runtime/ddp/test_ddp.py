"""``DistributedDataParallel`` in places where torch's own tests do not look."""

from __future__ import annotations

import copy
import gc
import pickle
import traceback
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel as Theirs

import soonest
from helpers.asked import asked_for
from helpers.ranks import run_ranks

STEPS = 30


class Net(nn.Module):
    """With BatchNorm, and a layer that odd steps leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16)
        self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, *, skip: bool = False) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return self.last(y if skip else torch.relu(self.middle(y)))


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(8, 6, generator=generator)


def train(ddp: nn.Module, *, steps: int = STEPS, optimizer: Any = None, **how: Any) -> None:
    optimizer = optimizer or torch.optim.AdamW(ddp.parameters(), lr=0.01)
    for step in range(steps):
        accumulates = how.get("accumulate") and step % 3 != 2
        with ddp.no_sync() if accumulates else nullcontext():  # type: ignore[operator]
            extra = {"skip": bool(step % 2)} if how.get("unused") else {}
            ddp(batch(step), **extra).square().mean().backward()
        if accumulates:
            continue
        if how.get("clip"):
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not how.get("zero"))


def bits(ddp: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in ddp.state_dict().items()}


def pair(**options: Any) -> tuple[Theirs, soonest.DistributedDataParallel]:
    torch.manual_seed(3)
    net = Net()
    return Theirs(copy.deepcopy(net), **options), soonest.DistributedDataParallel(net, **options)


def differing(theirs: Theirs, ours: nn.Module) -> list[str]:
    mine, wanted = bits(ours), bits(theirs)
    assert list(mine) == list(wanted)
    return [name for name in wanted if not torch.equal(mine[name], wanted[name])]


def plainly() -> list[str]:
    theirs, ours = pair()
    train(theirs)
    train(ours)
    return differing(theirs, ours)


def accumulating_and_clipping() -> list[str]:
    theirs, ours = pair(gradient_as_bucket_view=True)
    train(theirs, accumulate=True, clip=True)
    train(ours, accumulate=True, clip=True)
    return differing(theirs, ours)


def with_unused() -> list[str]:
    theirs, ours = pair(find_unused_parameters=True)
    train(theirs, unused=True, zero=True)
    train(ours, unused=True, zero=True)
    return differing(theirs, ours)


def with_its_optimizer() -> list[str]:
    theirs, ours = pair()
    train(theirs)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01)
    handle = ours.prioritize(optimizer)
    assert handle is ours.handle
    train(ours, optimizer=optimizer)
    return differing(theirs, ours)


def with_caps() -> list[str]:
    theirs, ours = pair(bucket_cap_mb=0.0001)
    train(theirs)
    train(ours)
    assert ours.handle is not None
    assert ours.handle.plan is not None
    assert len(ours.handle.plan.buckets) > 3
    return differing(theirs, ours)


def with_a_hook() -> list[str]:
    theirs, ours = pair(find_unused_parameters=True, bucket_cap_mb=0.0001)
    calls: list[tuple[int, bool]] = []

    def noting(state, bucket):  # torch's class would refuse other annotations than its own
        calls.append((bucket.index(), bucket.is_last()))
        assert [g.shape for g in bucket.gradients()] == [p.shape for p in bucket.parameters()]
        return default_hooks.allreduce_hook(None, bucket)

    theirs.register_comm_hook(None, default_hooks.allreduce_hook)
    ours.register_comm_hook(None, noting)
    train(theirs, unused=True)
    train(ours, unused=True)
    size = len(calls) // STEPS
    assert calls == [(i, i == size - 1) for i in range(size)] * STEPS
    return differing(theirs, ours)


def with_a_hook_and_its_optimizer() -> list[str]:
    theirs, ours = pair(find_unused_parameters=True)
    for ddp in (theirs, ours):
        ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    train(theirs, unused=True)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01)
    ours.prioritize(optimizer)
    train(ours, unused=True, optimizer=optimizer)
    return differing(theirs, ours)


def with_a_builtin_hook() -> list[str]:
    """It rounds, and both classes round a little differently."""
    theirs, ours = pair()
    _, exact = pair()
    for ddp in (theirs, ours):
        ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    for ddp in (theirs, ours, exact):
        train(ddp, optimizer=torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9))
    mine, wanted, exactly = bits(ours), bits(theirs), bits(exact)
    wrong = [n for n in wanted if not torch.allclose(mine[n], wanted[n], rtol=1e-2, atol=1e-3)]
    rounds = any(not torch.equal(mine[n], exactly[n]) for n in wanted)
    return wrong if rounds else ["nothing was rounded"]


def with_the_same_log() -> list[str]:
    """Whatever torch's class tells of settings and steps, ours does."""
    theirs, ours = pair(find_unused_parameters=True)
    train(theirs, unused=True, steps=4)
    train(ours, unused=True, steps=4)
    wanted, found = theirs._get_ddp_logging_data(), ours._get_ddp_logging_data()
    assert found["can_set_static_graph"] == 0, "odd steps leave out a layer"
    differ_by_nature = ("time", "bucket", "order")
    return [
        f"{key}: {value} / {found.get(key)}"
        for key, value in wanted.items()
        if found.get(key) != value and not any(word in key for word in differ_by_nature)
    ] + [key for key in wanted if key not in found]


def with_uneven_inputs() -> list[str]:
    theirs, ours = pair()
    for ddp in (theirs, ours):
        with ddp.join():
            train(ddp, steps=4 + 3 * dist.get_rank())
    wrong = differing(theirs, ours)
    train(theirs)
    train(ours)
    return wrong + differing(theirs, ours)


def with_uneven_inputs_and_its_optimizer() -> list[str]:
    theirs, ours = pair()
    with theirs.join():
        train(theirs, steps=6 - 2 * dist.get_rank())
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01)
    ours.prioritize(optimizer)
    with ours.join():
        train(ours, steps=6 - 2 * dist.get_rank(), optimizer=optimizer)
    return differing(theirs, ours)


def delayed_by_the_user() -> list[str]:
    torch.manual_seed(3)
    net = Net()
    alone = copy.deepcopy(net)
    later = [("last.weight", net.last.weight), ("last.bias", net.last.bias)]
    ours = soonest.DistributedDataParallel(
        net, delay_all_reduce_named_params=later, param_to_hook_all_reduce=net.first.weight
    )
    for _ in range(3):
        ours.zero_grad()
        ours(batch(1)).mean().backward()
    alone(batch(1)).mean().backward()
    wrong: list[str] = []
    for (name, mine), plain in zip(net.named_parameters(), alone.parameters(), strict=True):
        assert plain.grad is not None
        dist.all_reduce(plain.grad)
        if mine.grad is None or not torch.allclose(mine.grad, plain.grad / 2, atol=1e-6):
            wrong.append(name)
    return wrong


def second_passes_are_combined() -> list[str]:
    """Two forward passes, then a backward pass for each, as a discriminator has them."""
    _, ours = pair(broadcast_buffers=False)
    plain = copy.deepcopy(ours.module)
    real, fake = ours(batch(1)), ours(batch(2))
    real.mean().backward()
    fake.mean().backward()
    for number in (1, 2):
        plain(batch(number)).mean().backward()
    wrong: list[str] = []
    for (name, mine), alone in zip(ours.module.named_parameters(), plain.parameters(), strict=True):
        assert alone.grad is not None
        dist.all_reduce(alone.grad)
        if not torch.allclose(mine.grad, alone.grad / dist.get_world_size(), atol=1e-6):
            wrong.append(name)
    return wrong


def what_is_not_to_be_combined_is_not() -> list[str]:
    """One rank trains the bare module for itself, and nobody waits for the others."""
    _, ours = pair()
    train(ours, steps=3)
    if dist.get_rank() == 0:
        ours.module(batch(0)).mean().backward()
        ours.zero_grad()
    train(ours, steps=3)
    total = sum(p.detach().sum() for p in ours.parameters())
    totals = [torch.zeros(()) for _ in range(dist.get_world_size())]
    dist.all_gather(totals, total.clone())
    return [] if torch.equal(*totals) else ["parameters"]


def complex_parameters() -> list[str]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(torch.complex64)
    theirs, ours = Theirs(copy.deepcopy(net)), soonest.DistributedDataParallel(net)
    for ddp in (theirs, ours):
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
        for step in range(STEPS):
            optimizer.zero_grad()
            ddp(batch(step).to(torch.complex64)).abs().mean().backward()
            optimizer.step()
    return differing(theirs, ours)


def an_optimizer_with_more_than_is_combined() -> list[str]:
    """Parameters that are not shared are updated by themselves, as torch's class leaves them."""
    torch.manual_seed(3)
    net = Net()
    net.middle.requires_grad_(False)
    theirs, ours = Theirs(copy.deepcopy(net)), soonest.DistributedDataParallel(net)
    for ddp in (theirs, ours):
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
        if ddp is ours:
            ours.prioritize(optimizer)
        train(ddp, steps=3, optimizer=optimizer)
        ddp.module.middle.requires_grad_(True)
        train(ddp, steps=3, optimizer=optimizer)
    return differing(theirs, ours)


def gradients_detach_in_place() -> list[str]:
    _, ours = pair()
    ours(batch(0)).mean().backward()
    for parameter in ours.parameters():
        assert parameter.grad is not None
        parameter.grad.detach_()
    return []


def gone_it_leaves_a_plain_module() -> list[str]:
    _, ours = pair()
    net = ours.module
    train(ours, steps=3)
    del ours
    gc.collect()
    net.zero_grad()
    net(batch(dist.get_rank())).mean().backward()
    mine = net.first.weight.grad.clone()  # type: ignore[union-attr]
    every = [torch.zeros_like(mine) for _ in range(2)]
    dist.all_gather(every, mine)
    return [] if not torch.equal(*every) else ["gradients are still combined"]


def copies_train() -> list[str]:
    theirs, ours = pair()
    train(theirs, steps=4)
    train(ours, steps=4)
    again, pickled = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    theirs_again = copy.deepcopy(theirs)
    for ddp in (again, pickled, theirs_again):
        train(ddp, steps=4)
    wrong = [differing(theirs_again, ddp) for ddp in (again, pickled)]
    return [*wrong[0], *wrong[1], *differing(theirs, ours)]


def made_once_more() -> list[str]:
    """A second wrapper of the same module combines, as long as it lives; then the first again."""
    theirs, ours = pair()
    train(theirs, steps=3)
    other = soonest.DistributedDataParallel(ours.module)
    train(other, steps=3)
    wrong = differing(theirs, other)
    assert ours.has_given_way
    reducer = weakref.ref(other.reducer)
    del other
    gc.collect()
    assert reducer() is None
    train(theirs, steps=3)
    train(ours, steps=3)
    return wrong + differing(theirs, ours)


def refusals() -> list[str]:
    wanted = {
        "mixed_precision": {"mixed_precision": object()},
        "complex64": {"bucket_cap_mb": 1},
        "sparse": {},
    }
    models = {
        "complex64": nn.Linear(2, 2, dtype=torch.complex64),
        "sparse": nn.Embedding(4, 2, sparse=True),
    }
    wrong: list[str] = []
    for word, options in wanted.items():
        try:
            soonest.DistributedDataParallel(models.get(word) or Net(), **options)
            wrong.append(f"{word} was taken")
        except ValueError as error:
            if word not in str(error):
                wrong.append(str(error))
    inner = soonest.DistributedDataParallel(Net())
    for parameter in inner.parameters():
        parameter._in_backward_optimizers = []  # type: ignore[attr-defined]
    try:
        inner(batch(0))
        wrong.append("optimizers in the backward pass were taken")
    except ValueError as error:
        if "use an ordinary optimizer" not in str(error):
            wrong.append(str(error))
    _, ours = pair(bucket_cap_mb=1)
    try:
        ours.prioritize(torch.optim.SGD(ours.parameters(), lr=0.1), plan="plan.json")
        wrong.append("plan was taken")
    except ValueError as error:
        if "plan" not in str(error):
            wrong.append(str(error))
    try:
        soonest.prioritize(ours.module, torch.optim.SGD(ours.parameters(), lr=0.1))
        wrong.append("a module was prioritized whose gradients are combined already")
    except ValueError as error:
        if "already" not in str(error):
            wrong.append(str(error))
    return wrong


CASES: dict[str, Callable[[], list[str]]] = {
    case.__name__: case
    for case in (
        plainly,
        accumulating_and_clipping,
        with_unused,
        with_its_optimizer,
        with_caps,
        with_a_hook,
        with_a_hook_and_its_optimizer,
        with_a_builtin_hook,
        with_the_same_log,
        with_uneven_inputs,
        with_uneven_inputs_and_its_optimizer,
        delayed_by_the_user,
        second_passes_are_combined,
        what_is_not_to_be_combined_is_not,
        complex_parameters,
        an_optimizer_with_more_than_is_combined,
        gradients_detach_in_place,
        gone_it_leaves_a_plain_module,
        copies_train,
        made_once_more,
        refusals,
    )
}


def run_all(names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = CASES[name]()
        except Exception:
            found[name] = [traceback.format_exc()]
        gc.collect()
    return found


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(run_all, 2, asked_for(request, "name"), timeout_s=200)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, found: list[dict[str, Any]]) -> None:
    assert [rank[name] for rank in found] == [[], []]


def close_to_theirs(hooked: bool) -> list[str]:
    theirs, ours = pair()
    if hooked:
        for ddp in (theirs, ours):
            ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    for ddp in (theirs, ours):
        train(ddp, optimizer=torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9))
    mine, wanted = bits(ours), bits(theirs)
    return [n for n in wanted if not torch.allclose(mine[n], wanted[n], rtol=1e-3, atol=1e-4)]


@pytest.mark.parametrize(("ranks", "hooked"), [(1, True), (1, False), (3, False)])
def test_any_number_of_ranks(ranks: int, hooked: bool) -> None:
    assert run_ranks(close_to_theirs, ranks, hooked) == [[]] * ranks
