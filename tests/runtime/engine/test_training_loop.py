"""What training loops do besides the usual; that the numbers are right is in ``tests/parity``."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import soonest
from helpers.ranks import run_ranks, say_done, wait_for_the_others
from soonest.runtime.guard.compiled import Entries


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1)


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(torch.randn(6, 4) + dist.get_rank()).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def differs(tensor: Tensor) -> bool:
    """Whether the ranks have something different."""
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor.detach().clone())
    return any(not torch.equal(every[0], other) for other in every)


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = checkpoint(module, x, use_reentrant=True)
        return x


def passes_of_a_checkpoint() -> int:
    model = Checkpointed(*(nn.Linear(4, 4) for _ in range(3)))
    optimizer = sgd(model)
    handle = soonest.prioritize(model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(6, 4, requires_grad=True)).square().sum().backward()
        optimizer.step()
    assert handle.engine
    assert handle.engine.backward.latest
    return handle.engine.backward.latest.number + 1


def test_a_backward_pass_with_others_inside_combines_once() -> None:
    assert run_ranks(passes_of_a_checkpoint, 2) == [4, 4]


def checkpoints_that_change() -> list[Any]:
    """Which gradients wait for the end of a pass; and what is said when one comes too late."""
    model = Checkpointed(*(nn.Linear(4, 4) for _ in range(3)))
    model.append(model[1])
    optimizer = sgd(model)
    handle = soonest.prioritize(model, optimizer)
    waited: list[int] = []
    assert handle.engine
    end = handle.engine.backward._inner.end

    def ends() -> set[int]:
        found = end()
        waited.append(len(found))
        return found

    handle.engine.backward._inner.end = ends  # type: ignore[method-assign]
    x = torch.randn(6, 4, requires_grad=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    model.append(model[2])
    with pytest.raises(soonest.SoonestError) as refused:
        model(x).square().sum().backward()
    say_done()
    wait_for_the_others()
    return [waited, str(refused.value)]


def test_a_layer_in_several_checkpoints_waits_for_the_last_of_them() -> None:
    for waited, refused in run_ranks(checkpoints_that_change, 2):
        assert waited == [6, 2, 2], "weights and biases: of all, then of the one used twice"
        assert "'2.weight' got a second gradient" in refused or "'2.bias' got" in refused
        assert "use_reentrant=False" in refused


def buffers() -> list[bool]:
    model = net()
    optimizer = sgd(model)
    handle = soonest.prioritize(model, optimizer)
    for _ in range(3):
        step(model, optimizer)
    mean: Any = model[1].running_mean
    found = [differs(mean)]  # between forward passes each rank has its own
    model.eval()(torch.ones(1, 4))
    found.append(not differs(mean))
    model.train()
    step(model, optimizer)
    if dist.get_rank() == 0:  # one rank by itself, while another waits for nothing
        model.eval()(torch.ones(1, 4))
        say_done()
    else:
        wait_for_the_others()
    handle.detach()
    return found


def test_buffers_of_the_first_rank_are_there_in_the_next_forward_pass() -> None:
    assert run_ranks(buffers, 2) == [[True, True]] * 2


def own_buffers() -> bool:
    model = net()
    optimizer = sgd(model)
    soonest.prioritize(model, optimizer, broadcast_buffers=False)
    step(model, optimizer)
    return differs(model[1].running_mean)  # type: ignore[arg-type]


def test_buffers_may_be_left_alone() -> None:
    assert run_ranks(own_buffers, 2) == [True, True]


def unfreezes() -> dict[str, Any]:
    model = net()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    handle = soonest.prioritize(model, optimizer)
    while not handle.settled:
        step(model, optimizer)
    before = handle.plan
    model[0].requires_grad_(True)
    step(model, optimizer)
    after = handle.plan
    while not handle.settled:
        step(model, optimizer)
    assert before
    assert after
    names = [slot.name for plan in (before, after) for slot in plan.flats[0].slots]
    return {
        "names": names,
        "history": [line for line in handle.history if "other parameters" in line],
        "differs": [name for name, p in model.named_parameters() if differs(p)],
    }


def test_what_is_unfrozen_gets_into_the_plan() -> None:
    for rank in run_ranks(unfreezes, 3):
        assert rank["names"][:4] == ["1.weight", "1.bias", "3.weight", "3.bias"]
        assert set(rank["names"][4:]) == {*rank["names"][:4], "0.weight", "0.bias"}
        assert len(rank["history"]) == 1
        assert not rank["differs"]


def adds_a_stranger() -> tuple[str, int]:
    model = net()
    optimizer = sgd(model)
    soonest.prioritize(model, optimizer)
    with pytest.raises(ValueError) as refused:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    step(model, optimizer)
    return str(refused.value), len(optimizer.param_groups)


def test_a_group_of_foreign_parameters_is_not_added() -> None:
    for message, groups in run_ranks(adds_a_stranger, 2):
        assert "not the model's (group 1, number 0, shape (3,))" in message
        assert "nn.ModuleList" in message
        assert groups == 1


def several_optimizers() -> list[bool]:
    model = net()
    first, second = sgd(model[:2]), torch.optim.Adam(model[3].parameters())
    handles = soonest.prioritize(model, [first, second])
    one, other = handles
    assert one.plan
    assert other.plan
    found = [
        {slot.layer for slot in one.plan.flats[0].slots} == {"0", "1"},
        {slot.layer for slot in other.plan.flats[0].slots} == {"3"},
    ]
    with other.no_sync():
        model(torch.randn(6, 4) + dist.get_rank()).sum().backward()
    found += [differs(model[0].weight.grad), differs(model[3].weight.grad)]  # type: ignore[arg-type]
    for _ in range(3):
        step(model, first, second)
    found += [not differs(p) for p in model.parameters()]
    saved = other.state_dict()
    found += [set(saved["optim"]["state"]) == {"3.weight", "3.bias"}, len(saved["model"]) == 9]
    with pytest.raises(ValueError, match="several optimizers"):
        one.join()
    for handle in handles:
        handle.detach()
    return found


def test_each_of_several_optimizers_has_a_handle() -> None:
    for rank in run_ranks(several_optimizers, 2):
        assert all(rank)


def ends_early() -> str:
    model = net()
    optimizer = sgd(model)
    handle = soonest.prioritize(model, optimizer)

    def train() -> None:
        with handle.join(throw_on_early_termination=True):
            for _ in range(2 + dist.get_rank()):
                step(model, optimizer)

    with pytest.raises(RuntimeError) as raised:
        train()
    return str(raised.value)


def test_uneven_inputs_may_be_an_error() -> None:
    first, second = run_ranks(ends_early, 2)
    assert "exhausted" in first
    assert "exhausted" in second


def joins_sharded() -> str:
    model = net()
    handle = soonest.prioritize(model, sgd(model), shard_optimizer=True)
    with pytest.raises(ValueError) as refused:
        handle.join()
    return str(refused.value)


def test_ranks_that_share_out_the_optimizer_must_all_step() -> None:
    assert all("as many batches" in said for said in run_ranks(joins_sharded, 2))


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def half_compiled() -> tuple[Compiled, torch.optim.Optimizer]:
    """Two blocks that are compiled for ``fullgraph``: nothing of ours may break them up."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Compiled()
    model.blocks[0].compile(backend="eager", fullgraph=True)
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager", fullgraph=True)  # type: ignore[assignment]
    return model, sgd(model)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiles() -> dict[str, Any]:
    model, optimizer = half_compiled()
    for _ in range(6):
        step(model, optimizer)
    alone = graphs()
    model, optimizer = half_compiled()
    called = model.blocks[0]._compiled_call_impl
    handle = soonest.prioritize(model, optimizer)
    for _ in range(6):
        step(model, optimizer)
    together = graphs()
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model.blocks[0]))
    for twin in copies:
        twin(torch.ones(1, 4)).sum().backward()
    handle.detach()
    return {
        "more graphs": together - alone,
        "restored": model.blocks[0]._compiled_call_impl is called,
        "hooks": len(model.blocks[1]._forward_pre_hooks),
    }


def test_who_compiles_the_whole_model_is_told_what_that_costs() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entries = Entries(model)
    model.compile(backend="eager")
    with pytest.warns(UserWarning, match="compile its blocks instead"):
        entries.renew()


def test_compiled_blocks_stay_whole() -> None:
    for rank in run_ranks(compiles, 2):
        assert rank == {"more graphs": 0, "restored": True, "hooks": 0}
