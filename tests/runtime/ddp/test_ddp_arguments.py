"""Every argument of torch's ``DistributedDataParallel`` is honoured, or refused with a sentence."""

from __future__ import annotations

import copy
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as Theirs
from torch.utils.checkpoint import checkpoint

import soonest
from helpers.asked import asked_for
from helpers.equal import equal
from helpers.ranks import run_ranks
from soonest.runtime.ddp import arguments

STEPS = 6
ARGUMENTS = [name for name in inspect.signature(Theirs.__init__).parameters if name != "self"]


class Net(nn.Module):
    """With BatchNorm, and a layer that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16)
        self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, *, short: bool = False) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return self.last(y if short else torch.relu(self.middle(y)))


class Recomputed(nn.Module):
    """Runs through one layer twice, each time in a checkpoint, which only static graphs allow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.again, x, use_reentrant=True)
        return x


def net(*, seed: int = 3) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(8, 6, generator=generator)


def train(model: Any, *, steps: int = STEPS, **forward: Any) -> dict[str, Any]:
    """Trains, and returns all that must be equal: what is on this rank now, and was on the way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses: list[Tensor] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(batch(step), **forward).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {
        "losses": losses,
        "state": copy.deepcopy(model.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "forward_sync_buffers": model.forward_sync_buffers,
    }


def alike(make: Callable[..., nn.Module] = net, /, *, forward: Any = None, **options: Any) -> Any:
    """Trains with torch's class and with ours, and returns both of ours when they are equal."""
    theirs, ours = Theirs(make(), **options), soonest.DistributedDataParallel(make(), **options)
    wanted, found = train(theirs, **(forward or {})), train(ours, **(forward or {}))
    wrong = [name for name in wanted if not equal(wanted[name], found[name])]
    assert not wrong, wrong
    return ours


def differ(tensor: Tensor) -> bool:
    """Whether the ranks have something different."""
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor.detach().clone())
    return any(not torch.equal(every[0], other) for other in every)


def refusals(**options: Any) -> list[str]:
    """What torch's class and ours say to something that neither can do."""
    said: list[str] = []
    for cls in (Theirs, soonest.DistributedDataParallel):
        with pytest.raises((ValueError, RuntimeError)) as refused:
            cls(net(), **options)
        said.append(str(refused.value))
    return said


@contextmanager
def warned() -> Iterator[list[str]]:
    """What is warned of in here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said: list[str] = []
        yield said
        said += [str(one.message) for one in caught]


# One function per argument. It fails unless ours does what torch's class does.


def module() -> None:
    inner = net()
    ours = soonest.DistributedDataParallel(inner)
    assert ours.module is inner
    assert all(name.startswith("module.") for name in ours.state_dict())


def device_ids() -> None:
    """Are for GPUs; on CPUs there are none to give."""
    alike(device_ids=None)
    alike(device_ids=[])
    theirs, ours = refusals(device_ids=[0])
    assert theirs == ours


def output_device() -> None:
    alike(output_device=None)
    theirs, ours = refusals(output_device=1)
    assert theirs == ours


def dim() -> None:
    """Where ``scatter`` and ``gather`` cut batches."""
    ours = alike(dim=1)
    assert ours.dim == 1


def own_start() -> Net:
    """Parameters and buffers that differ between ranks."""
    model = net(seed=dist.get_rank())
    model.norm.running_mean += dist.get_rank()  # type: ignore[operator]
    return model


def buffers_seen(**options: Any) -> list[bool]:
    """Whether ranks have different buffers as forward passes begin, with either class."""
    seen: list[bool] = []

    def look(model: Any, *_: Any) -> None:
        seen.append(differ(model.norm.running_mean))

    def make() -> Net:
        model = own_start()
        model.register_forward_pre_hook(look)
        return model

    alike(make, **options)
    assert seen[:STEPS] == seen[STEPS:]
    return seen[STEPS:]


def broadcast_buffers() -> None:
    with warned() as said:
        assert buffers_seen(broadcast_buffers=False) == [True] * STEPS
    assert sum("`broadcast_buffers` is deprecated" in one for one in said) == 2
    assert buffers_seen(broadcast_buffers=True) == buffers_seen() == [False] * STEPS


def init_sync() -> None:
    ours = alike(own_start, init_sync=False)
    assert differ(ours.module.first.weight)
    assert not differ(ours.module.first.weight.grad)
    assert not differ(alike(own_start).module.first.weight)


def process_group() -> None:
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    ours = alike(process_group=alone[dist.get_rank()])
    assert differ(ours.module.first.weight), "each rank trains alone"
    assert not differ(alike(process_group=dist.new_group()).module.first.weight)


def buckets(ours: Any) -> int:
    return len(ours.handle.plan.buckets)


def bucket_cap_mb() -> None:
    assert buckets(alike(bucket_cap_mb=100)) == 1
    assert buckets(alike(bucket_cap_mb=0.0001)) > 3


def bucket_cap_mb_list() -> None:
    ours = alike(bucket_cap_mb_list=[0.0001, 100])
    assert 1 < buckets(ours) < buckets(alike(bucket_cap_mb_list=[0.0001]))


def find_unused_parameters() -> None:
    ours = alike(forward={"short": True}, find_unused_parameters=True)
    assert ours.module.middle.weight.grad is None
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        train(soonest.DistributedDataParallel(net()), short=True)


def check_reduction() -> None:
    """Does nothing, as torch's class says."""
    with warned() as said:
        alike(check_reduction=True)
    assert sum("`check_reduction` argument" in one for one in said) == 2


def gradient_as_bucket_view() -> None:
    for view in (True, False):
        ours = alike(gradient_as_bucket_view=view)
        assert ours.gradient_as_bucket_view is view


def static_graph() -> None:
    alike(static_graph=True)
    alike(forward={"short": True}, static_graph=True)

    def make() -> nn.Module:
        torch.manual_seed(3)
        return Recomputed()

    alike(make, static_graph=True)
    ours = soonest.DistributedDataParallel(net(), static_graph=True)
    train(ours, steps=2)
    with pytest.raises(RuntimeError, match="training graph has changed"):
        train(ours, steps=2, short=True)


def delay(model: Net) -> dict[str, Any]:
    return {
        "delay_all_reduce_named_params": [
            ("last.weight", model.last.weight), ("last.bias", model.last.bias)
        ],
        "param_to_hook_all_reduce": model.first.weight,
    }  # fmt: skip


def delay_all_reduce_named_params() -> None:
    """Without an optimizer: torch's class does not wait for these, and so cannot be compared."""
    one, other = net(), net()
    for wrapped in (soonest.DistributedDataParallel(one, **delay(one)), Theirs(other)):
        for _ in range(3):
            wrapped.zero_grad()
            wrapped(batch(1)).square().mean().backward()
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name  # type: ignore[arg-type]
    theirs, mine = refusals(delay_all_reduce_named_params=[("last.weight", one.last.weight)])
    assert theirs == mine


def param_to_hook_all_reduce() -> None:
    theirs, ours = refusals(param_to_hook_all_reduce=net().first.weight)
    assert theirs == ours


def mixed_precision() -> None:
    alike(mixed_precision=None)
    with pytest.raises(ValueError, match=r"mixed_precision was given, .* use torch.autocast"):
        soonest.DistributedDataParallel(net(), mixed_precision=object())  # type: ignore[arg-type]


def device_mesh() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ours = alike(device_mesh=mesh)
    assert not differ(ours.module.first.weight)
    theirs, mine = refusals(device_mesh=init_device_mesh("cpu", (1, dist.get_world_size())))
    assert theirs == mine
    theirs, mine = refusals(device_mesh=mesh, process_group=dist.new_group())
    assert theirs == mine


def skip_all_reduce_unused_params() -> None:
    options = {"find_unused_parameters": True, "skip_all_reduce_unused_params": True}
    ours = alike(forward={"short": True}, **options)
    names = [slot.name for flat in ours.handle.plan.flats for slot in flat.slots]
    assert not [name for name in names if name.startswith("middle")]
    assert {"first.weight", "last.bias"} <= set(names)


def batched_grad_copy() -> None:
    """Says how to copy, which changes no number."""
    assert alike(batched_grad_copy=True).batched_grad_copy


def forward_sync_buffers() -> None:
    """Unlike with the older argument, buffers are equal at first."""
    assert buffers_seen(forward_sync_buffers=False) == [False, *[True] * (STEPS - 1)]
    assert buffers_seen(forward_sync_buffers=True) == [False] * STEPS


def run_all(names: list[str]) -> dict[str, str]:
    """By argument, what went wrong on this rank."""
    found: dict[str, str] = {}
    warnings.simplefilter("ignore")
    for name in names:
        try:
            globals()[name]()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    return run_ranks(run_all, 2, asked_for(request, "argument"))


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_it_is_honoured_or_refused(argument: str, found: list[dict[str, str]]) -> None:
    for rank in found:
        assert not rank[argument], rank[argument]


def test_an_argument_of_a_newer_torch_is_refused() -> None:
    refused = arguments.refusal({"module": None, "later": 1})
    assert isinstance(refused, ValueError)
    assert str(refused).startswith("later is an argument of a torch newer")


def test_all_arguments_are_known() -> None:
    assert set(ARGUMENTS) == arguments._KNOWN
