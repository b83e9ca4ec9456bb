"""What cannot work is refused in one sentence that says how to mend it; what can, works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import soonest
from helpers.ranks import run_ranks
from soonest.errors import PlanMismatchError, SoonestError


def plain() -> tuple[Any, Any]:
    model = nn.Linear(3, 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def wrapped_by_ddp() -> tuple[Any, Any]:
    model, optimizer = plain()
    return DistributedDataParallel(model), optimizer


def holds_ddp() -> tuple[Any, Any]:
    model, optimizer = plain()
    return nn.Sequential(DistributedDataParallel(model)), optimizer


def wrapped_by_fsdp() -> tuple[Any, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def foreign_parameters() -> tuple[Any, Any]:
    return nn.Linear(3, 3), torch.optim.SGD(nn.Linear(2, 7).parameters(), lr=0.1)


def several_devices() -> tuple[Any, Any]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def sparse() -> tuple[Any, Any]:
    model = nn.Embedding(5, 3, sparse=True)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def twice() -> tuple[Any, Any]:
    model, optimizer = plain()
    soonest.prioritize(model, optimizer)
    return model, optimizer


def no_parameters() -> tuple[Any, Any]:
    return nn.ReLU(), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


def all_frozen() -> tuple[Any, Any]:
    model, optimizer = plain()
    return model.requires_grad_(False), optimizer


def lazy() -> tuple[Any, Any]:
    model = nn.LazyLinear(3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def differentiable() -> tuple[Any, Any]:
    model = nn.Linear(3, 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True)


def capturable() -> tuple[Any, Any]:
    model = nn.Linear(3, 3)
    return model, torch.optim.Adam(model.parameters(), capturable=True)


def sync_batchnorm() -> tuple[Any, Any]:
    model = nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def wrapped_from_outside() -> tuple[Any, Any]:
    model, optimizer = plain()
    KEPT.append(DistributedDataParallel(model))
    return model, optimizer


def in_data_parallel() -> tuple[Any, Any]:
    model, optimizer = plain()
    KEPT.append(nn.DataParallel(model))
    return model, optimizer


def in_our_class() -> tuple[Any, Any]:
    model, optimizer = plain()
    KEPT.append(soonest.DistributedDataParallel(model, init_sync=False))
    return model, optimizer


def our_class() -> tuple[Any, Any]:
    model, optimizer = plain()
    return soonest.DistributedDataParallel(model, init_sync=False), optimizer


def of_another_library() -> tuple[Any, Any]:
    model, optimizer = plain()
    namespace = {"__module__": "horovod.torch.optimizer"}
    optimizer.__class__ = type("SGD", (type(optimizer),), namespace)
    return model, optimizer


def wrapper_of_two() -> tuple[Any, Any]:
    model, optimizer = plain()
    wrapper: Any = object.__new__(torch.optim.Optimizer)
    wrapper.first, wrapper.second = optimizer, torch.optim.Adam(model.parameters())
    return model, wrapper


def with_buffer(buffer: Tensor) -> tuple[Any, Any]:
    model, optimizer = plain()
    model.register_buffer("odd", buffer)
    return model, optimizer


def expanded_buffer() -> tuple[Any, Any]:
    return with_buffer(torch.ones(1).expand(4))


def sparse_buffer() -> tuple[Any, Any]:
    return with_buffer(torch.eye(3).to_sparse())


KEPT: list[Any] = []


def two_optimizers_of_one_parameter() -> tuple[Any, Any]:
    model, optimizer = plain()
    return model, [optimizer, torch.optim.Adam([model.bias])]


def no_optimizer() -> tuple[Any, Any]:
    return plain()[0], []


def not_all_optimizers() -> tuple[Any, Any]:
    model, optimizer = plain()
    return model, [optimizer, "SGD"]


def two_optimizers_one_by_one() -> tuple[Any, Any]:
    model = nn.Linear(3, 3)
    soonest.prioritize(model, torch.optim.SGD([model.weight], lr=0.1))
    return model, torch.optim.SGD([model.bias], lr=0.1)


def not_a_model() -> tuple[Any, Any]:
    return [], plain()[1]


def not_an_optimizer() -> tuple[Any, Any]:
    return plain()[0], "SGD"


BAD: dict[Callable[[], tuple[Any, Any]], tuple[type[Exception], str]] = {
    wrapped_by_ddp: (ValueError, "wrapped by DistributedDataParallel"),
    holds_ddp: (ValueError, "module '0' is wrapped by DistributedDataParallel"),
    wrapped_by_fsdp: (ValueError, "FSDP"),
    foreign_parameters: (ValueError, "not the model's (group 0, number 0, shape (7, 2)): build it"),
    several_devices: (ValueError, "one device"),
    sparse: (ValueError, "sparse=False"),
    twice: (ValueError, "prioritized already"),
    no_parameters: (ValueError, "no parameter that requires a gradient"),
    all_frozen: (ValueError, "no parameter that requires a gradient"),
    lazy: (ValueError, "run one forward pass"),
    differentiable: (ValueError, "differentiable=False"),
    capturable: (ValueError, "capturable=False"),
    sync_batchnorm: (ValueError, "module '1' is a SyncBatchNorm"),
    wrapped_from_outside: (ValueError, "wrapped by DistributedDataParallel from outside"),
    in_data_parallel: (ValueError, "wrapped by DataParallel from outside"),
    in_our_class: (ValueError, "call the prioritize(optimizer) of that one"),
    our_class: (ValueError, "call its own prioritize(optimizer)"),
    of_another_library: (ValueError, "wrapped by horovod, which synchronizes gradients itself"),
    wrapper_of_two: (TypeError, "holds 2 optimizers: give prioritize the torch.optim.Optimizer"),
    expanded_buffer: (ValueError, "buffer 'odd' is expanded (shape (4,), strides (0,))"),
    sparse_buffer: (ValueError, "buffer 'odd' is torch.sparse_coo"),
    two_optimizers_of_one_parameter: (
        ValueError,
        "hold the same parameter ('bias')",
    ),
    no_optimizer: (ValueError, "no optimizer was given"),
    not_all_optimizers: (TypeError, "an optimizer is a str"),
    two_optimizers_one_by_one: (ValueError, "prioritize(model, [first, second])"),
    not_a_model: (TypeError, "torch.nn.Module"),
    not_an_optimizer: (TypeError, "torch.optim.Optimizer"),
}


def refusals() -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for build in BAD:
        try:
            soonest.prioritize(*build())
            found[build.__name__] = ("nothing", "")
        except Exception as error:
            found[build.__name__] = (type(error).__name__, str(error))
    return found


@pytest.fixture(scope="module")
def refused() -> dict[str, tuple[str, str]]:
    return run_ranks(refusals, 2)[0]


@pytest.mark.parametrize("build", BAD, ids=lambda build: build.__name__)
def test_bad_input(build: Callable[..., Any], refused: dict[str, tuple[str, str]]) -> None:
    error, text = BAD[build]
    name, message = refused[build.__name__]
    assert name == error.__name__
    assert text in message
    assert "\n" not in message


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"method": "pigeon"}, "no method 'pigeon': there are allreduce, gather"),
    ({"method": "hierarchical"}, "needs several hosts with the same number of ranks"),
    ({"method": "shard"}, "method 'shard' shards the optimizer's state: say shard_optimizer"),
    ({"method": "gather", "shard_optimizer": True}, "take method='shard'"),
    ({"shard_optimizer": True, "separable": False}, "leave out one of them"),
    ({"wire_dtype": torch.int8}, "must be torch.bfloat16, torch.float16, or None"),
    ({"wire_dtype": torch.float32}, "must be torch.bfloat16, torch.float16, or None"),
    ({"parameter_wire_dtype": torch.int8}, "parameter_wire_dtype is torch.int8, but must be"),
    ({"parameter_wire_dtype": torch.bfloat16}, "parameters are only sent under shard_optimizer"),
]


def option_refusals() -> list[str]:
    said: list[str] = []
    for options, _ in OPTIONS:
        with pytest.raises(ValueError) as refused:
            soonest.prioritize(*plain(), **options)
        said.append(str(refused.value))
    return said


def test_options_that_cannot_be() -> None:
    for said in run_ranks(option_refusals, 2):
        for message, (_, text) in zip(said, OPTIONS, strict=True):
            assert text in message
            assert "\n" not in message


def complex_refusal() -> str:
    model = nn.Linear(3, 3, dtype=torch.complex64)
    with pytest.raises(ValueError) as refused:
        soonest.prioritize(model, torch.optim.SGD(model.parameters(), lr=0.1), shard_optimizer=True)
    return str(refused.value)


def test_states_of_complex_parameters_are_not_shared_out() -> None:
    for said in run_ranks(complex_refusal, 2):
        assert "'weight' is torch.complex64" in said
        assert "leave out shard_optimizer" in said


def test_no_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        soonest.prioritize(*plain())


def alone() -> list[Any]:
    model, optimizer = plain()
    before = type(optimizer)
    handle = soonest.prioritize(
        model, optimizer, shard_optimizer=True, method="shard", wire_dtype=torch.bfloat16
    )
    with handle.no_sync():
        model(torch.ones(1, 3)).sum().backward()
    assert float(handle.clip_grad_norm_(1.0)) > 1.0
    optimizer.step()
    handle.flush()
    assert str(handle.report()) == "one rank: nothing to send"
    with pytest.raises(ValueError, match="prioritized already"):
        soonest.prioritize(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="has been wrapped by DistributedDataParallel"):
        DistributedDataParallel(model)(torch.ones(1, 3))
    assert handle.optimizer_state_dict() == optimizer.state_dict()
    with pytest.raises(ValueError, match="no method 'pigeon'"):
        soonest.prioritize(*plain(), method="pigeon")
    result = [handle.plan, handle.timeline(), type(optimizer) is before]
    handle.detach()
    handle.detach()
    return result


def wrapped_later() -> list[str]:
    """What is said when a prioritized model is wrapped, and then called."""
    said: list[str] = []
    for wrap in (DistributedDataParallel, nn.Sequential):
        model, optimizer = plain()
        handle = soonest.prioritize(model, optimizer)
        net = wrap(model)
        net = net if wrap is DistributedDataParallel else DistributedDataParallel(net)
        with pytest.raises(ValueError) as refused:
            net(torch.ones(1, 3))
        said.append(str(refused.value))
        handle.detach()
    model, _ = plain()
    with pytest.raises(ValueError) as refused:
        DistributedDataParallel(soonest.DistributedDataParallel(model))(torch.ones(1, 3))
    return [*said, str(refused.value)]


def test_a_model_that_is_wrapped_later_is_refused_when_it_is_called() -> None:
    for said in run_ranks(wrapped_later, 2):
        for sentence in said:
            assert (
                "wrapped by DistributedDataParallel, which synchronizes gradients itself"
                in sentence
            )
            assert "soonest.DistributedDataParallel(model) in its place" in sentence


def laid_out_by_rank() -> str:
    model = nn.Conv2d(2, 4, 3)
    if dist.get_rank():
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with pytest.raises(PlanMismatchError) as refused:
        soonest.prioritize(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return str(refused.value)


def test_ranks_must_lay_parameters_out_alike() -> None:
    for said in run_ranks(laid_out_by_rank, 2):
        assert "in memory by (18, 1, 6, 2) on rank 1" in said


def cut_short() -> str:
    """A part of a parameter begins where that does, and has its strides."""
    model, optimizer = plain()
    soonest.prioritize(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    model.weight.data = model.weight.data[:2]
    with pytest.raises(SoonestError) as refused:
        optimizer.step()
    return str(refused.value)


def test_a_parameter_that_is_cut_short_is_refused() -> None:
    for said in run_ranks(cut_short, 2):
        assert "'weight' is float32 (2, 3) on cpu now, but was float32 (3, 3)" in said


def replaced_step() -> list[str]:
    """What is said of a step that nobody can see through, with the state shared out and without."""
    model, optimizer = plain()
    optimizer.step = print  # type: ignore[method-assign]
    with pytest.raises(ValueError) as refused:
        soonest.prioritize(model, optimizer, shard_optimizer=True)
    with pytest.warns(UserWarning, match="was replaced by") as warned:
        soonest.prioritize(model, optimizer)
    return [str(refused.value), *(str(one.message) for one in warned)]


def test_a_step_that_cannot_be_seen_through() -> None:
    for refused, *warned in run_ranks(replaced_step, 2):
        assert "so ranks cannot update their own parts only" in refused
        assert any("nothing of it overlaps the next forward pass" in one for one in warned)


def test_a_group_of_one_rank_does_nothing() -> None:
    assert run_ranks(alone, 1) == [[None, None, True]]
