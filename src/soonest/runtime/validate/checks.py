"""Refuses models, optimizers and options that cannot be prioritized, in one sentence each."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from soonest.core.plan import METHODS
from soonest.runtime.comm import Wire
from soonest.runtime.execute.choose_lane import has_lane
from soonest.runtime.flat.buffers import trainable
from soonest.runtime.flat.storage import overlap
from soonest.runtime.optim.patch import is_taken_over
from soonest.runtime.validate import wrappers


def check(model: nn.Module, optimizer: Optimizer, without: Collection[str] = ()) -> None:
    """Raises ValueError (TypeError for a wrong type) if soonest cannot work with these two.

    Args:
        model, optimizer: the user's own.
        without: names of parameters that are left alone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, but must be a torch.nn.Module")
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "there is no process group: call torch.distributed.init_process_group() "
            "before soonest.prioritize()"
        )
    if is_taken_over(optimizer):
        raise ValueError(
            "this optimizer is prioritized already: call prioritize once, "
            "or detach() the handle of the first call before"
        )
    wrappers.check_optimizer_of_others(optimizer)
    check_model(model, without)
    check_optimizer(model, optimizer)


def check_model(model: nn.Module, without: Collection[str] = ()) -> None:
    """Raises ValueError if the gradients of this model cannot be synchronized, as it is now."""
    wrappers.check_inside(model)
    named = trainable(model, without)
    if not named:
        raise ValueError(
            "the model has no parameter that requires a gradient, so there is nothing to send: "
            "call prioritize on the model that is trained"
        )
    for name, _, parameter in named:
        _check_parameter(name, parameter)
    _check_devices(named)
    for name, buffer in model.named_buffers():
        check_buffer(name, buffer)
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and named[0][2].device.type == "cpu":
            raise ValueError(
                f"module {name!r} is a SyncBatchNorm, which torch has for GPUs only: use BatchNorm"
            )
        sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        if sparse and f"{name}.weight".removeprefix(".") not in without:
            raise ValueError(
                f"module {name!r} produces sparse gradients, which cannot be reduced: "
                "build it with sparse=False"
            )


def check_several(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raises ValueError if these optimizers cannot train parts of one model.

    Args:
        model, optimizers: the user's own.
    """
    if not optimizers:
        raise ValueError("no optimizer was given: give one, or a list of all that train the model")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: set[int] = set()
    for optimizer in optimizers:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if both := mine & seen:
            name = names.get(both.pop(), "not of the model")
            raise ValueError(
                f"two optimizers hold the same parameter ({name!r}), and which of them comes first "
                "could not be kept: let each hold parameters of its own"
            )
        seen |= mine


def check_options(method: str | None, wire: Wire, *, shard_optimizer: bool) -> None:
    """Raises ValueError if there is no such method, or things cannot be sent so."""
    if method is not None and method not in METHODS:
        raise ValueError(f"no method {method!r}: there are {', '.join(METHODS)}")
    for option, dtype, what in (
        ("wire_dtype", wire.gradients, "gradients"),
        ("parameter_wire_dtype", wire.parameters, "parameters"),
    ):
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{option} is {dtype}, but must be torch.bfloat16, torch.float16, or None for "
                f"{what} as they are"
            )
    if wire.parameters and not shard_optimizer:
        raise ValueError(
            f"parameter_wire_dtype is {wire.parameters}, but parameters are only sent under "
            "shard_optimizer=True: say that, too, or leave this out"
        )


def check_parts(model: nn.Module, without: Collection[str]) -> None:
    """Raises ValueError if the state of a parameter could not be sharded over the ranks."""
    for name, _, parameter in trainable(model, without):
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}, and states of complex parameters are "
                "not sharded: leave out shard_optimizer=True"
            )
        if not is_non_overlapping_and_dense_or_false(parameter):
            raise ValueError(
                f"parameter {name!r} has gaps in memory (strides {parameter.stride()}), so ranks "
                "cannot update parts of it: give it memory of its own, as by p.data = p.data."
                "clone(memory_format=torch.contiguous_format), or leave out shard_optimizer=True"
            )
    if overlap([parameter for _, _, parameter in trainable(model, without)]):
        raise ValueError(OVERLAP)


OVERLAP = (
    "parameters share memory without being the same Parameter, so the order in which they are "
    "updated counts, and ranks cannot update parts of them: leave out shard_optimizer=True, or "
    "assign one of them to both modules (a.weight = b.weight)"
)


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise ValueError(
            f"parameter {name!r} has no shape yet: run one forward pass before prioritize"
        )
    if type(parameter).__torch_function__ is not torch._C._disabled_torch_function_impl:
        raise ValueError(
            f"parameter {name!r} is a {type(parameter).__name__} with a __torch_function__ of its "
            "own (a DTensor, perhaps), which soonest does not support: use plain parameters"
        )
    if parameter.layout is not torch.strided:
        raise ValueError(f"parameter {name!r} is {parameter.layout}, but must be dense")


def _check_devices(named: list[tuple[str, str, nn.Parameter]]) -> None:
    first_name, _, first = named[0]
    for name, _, parameter in named:
        if parameter.device != first.device:
            raise ValueError(
                f"parameter {name!r} is on {parameter.device}, {first_name!r} on {first.device}: "
                "soonest needs all parameters of a rank on one device"
            )
    if not has_lane(first.device):
        raise ValueError(
            f"the model is on {first.device}: soonest runs on CPUs and on this machine's "
            "accelerator, if it has streams: move the model there"
        )


def check_optimizer(model: nn.Module, optimizer: Optimizer, former: Collection[int] = ()) -> None:
    """Raises ValueError if the optimizer has something that cannot be updated here.

    Args:
        model, optimizer: the user's own.
        former: ids of parameters that it has held before; they may have left the model since.
    """
    known = {id(parameter) for parameter in model.parameters()}.union(former)
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                raise ValueError(
                    f"the optimizer holds a parameter that is not the model's (group {g}, "
                    f"number {i}, shape {tuple(parameter.shape)}): build it from "
                    "model.parameters(), or, where it trains several models, give prioritize an "
                    "nn.ModuleList of them"
                )
        if group.get("capturable") and any(p.device.type == "cpu" for p in group["params"]):
            raise ValueError(
                "the optimizer is capturable, which torch has for GPUs only: build it with "
                "capturable=False"
            )
        if group.get("differentiable"):
            raise ValueError(
                "the optimizer is differentiable, and its updates could not be differentiated "
                "through here: build it with differentiable=False"
            )


def check_buffer(name: str, buffer: Tensor) -> None:
    """Raises ValueError if a buffer cannot be sent."""
    what = None
    if buffer.layout is not torch.strided or buffer.is_nested:
        what = f"is {buffer.layout}" if buffer.layout is not torch.strided else "is nested"
    elif buffer.is_quantized:
        what = "is quantized"
    elif any(n > 1 and not step for n, step in zip(buffer.shape, buffer.stride(), strict=True)):
        what = f"is expanded (shape {tuple(buffer.shape)}, strides {buffer.stride()})"
    if what is not None:
        raise ValueError(
            f"buffer {name!r} {what}, and cannot be sent to other ranks: make it an ordinary dense "
            "tensor, as by .clone() or .to_dense(), or keep it as a plain attribute"
        )
