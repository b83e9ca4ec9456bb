"""Actions: what is trained changes, and how."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fuzz.loops import action
from fuzz.run import Run

_PLACES = tuple(range(6))


@action("between", place=_PLACES, whole=(True, False))
def freeze(run: Run, place: int, whole: bool) -> None:
    """A layer, or one of its parameters; but never the last one that is trained."""
    left = sum(p.requires_grad for p in run.parameters())
    for p in list(run.layer(place).parameters(recurse=False))[: None if whole else 1]:
        if p.requires_grad and left > 2:
            left -= 1
            p.requires_grad_(False)
    run.stale = True


@action("between", place=_PLACES, all_of_it=(False, True))
def unfreeze(run: Run, place: int, all_of_it: bool) -> None:
    (run.model if all_of_it else run.layer(place)).requires_grad_(True)
    run.stale = True


@action("between", place=_PLACES)
def freeze_for_a_step(run: Run, place: int) -> None:
    """As a GAN's halves; DDP is not wrapped anew."""
    layer = run.layer(place)
    trained = [p for p in layer.parameters(recurse=False) if p.requires_grad]
    if len(trained) == sum(p.requires_grad for p in run.parameters()) or run.stale:
        return
    for p in trained:
        p.requires_grad_(False)
    run.zero()
    run.one_pass()
    run.step()
    for p in trained:
        p.requires_grad_(True)


def _positions(optimizer: Optimizer) -> dict[int, tuple[dict[str, Any], int]]:
    return {
        id(p): (group, place)
        for group in optimizer.param_groups
        for place, p in enumerate(group["params"])
    }


def _replaced(run: Run, old: nn.Parameter, new: nn.Parameter, how: str) -> None:
    """Gives the optimizer the new one for the old one."""
    run.has_orphans = True
    found = _positions(run.optimizer).get(id(old))
    if found is None or how == "added":
        run.optimizer.add_param_group({"params": [new]})
        return
    group, place = found
    if how == "whole":
        group["params"] = [new if p is old else p for p in group["params"]]
    else:
        group["params"][place] = new


@action("between", place=_PLACES, how=("whole", "in place", "added"), apart=(False, True))
def replace_layer(run: Run, place: int, how: str, apart: bool) -> None:
    """A linear layer is replaced by a new one, which ranks may make in different ways."""
    found = [m for m in run.model.modules() if type(m) is nn.Linear]
    if not found:
        return
    old = found[place % len(found)]
    torch.manual_seed(run.loop.seed + run.at + apart * run.rank)
    new = nn.Linear(old.in_features, old.out_features, old.bias is not None, dtype=old.weight.dtype)
    for path, module in list(run.model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, last = path.rpartition(".")
            setattr(run.model.get_submodule(parent), last, new)
    for p, q in zip(old.parameters(), new.parameters(), strict=True):
        _replaced(run, p, q, how)
    run.stale = True
    if apart:  # until the next pass, DDP does not know of it
        run.one_pass()


@action("between", place=_PLACES, how=("whole", "in place"))
def replace_parameter(run: Run, place: int, how: str) -> None:
    """One parameter is replaced by another object with the same values."""
    layer = run.layer(place)
    name, old = next((n, p) for n, p in layer.named_parameters(recurse=False))
    new = nn.Parameter(old.detach().clone(), old.requires_grad)
    for module in run.model.modules():
        for key, p in list(module._parameters.items()):
            if p is old:
                setattr(module, key, new)
    if name != "":
        _replaced(run, old, new, how)
    run.stale = True


class _With(nn.Module):
    """A layer with another behind it."""

    def __init__(self, layer: nn.Module, extra: nn.Module) -> None:
        super().__init__()
        self.layer, self.extra = layer, extra

    def forward(self, *args: Any) -> Any:
        return self.extra(self.layer(*args))


@action(
    "between", kind=("linear", "adapter", "norm without parameters", "norm"), apart=(False, True)
)
def insert_layer(run: Run, kind: str, apart: bool) -> None:
    """Something new stands behind the last layer."""
    last = getattr(run.model, "last", None)
    if not isinstance(last, nn.Module) or run.memory.get("inserted", 0) > 1:
        return
    if kind == "norm without parameters" and not any(True for _ in run.model.buffers()):
        return  # then DDP shares no buffers that come later
    run.memory["inserted"] = run.memory.get("inserted", 0) + 1
    torch.manual_seed(run.loop.seed + run.at + apart * run.rank)
    size = 3
    extra = {
        "linear": lambda: nn.Linear(size, size),
        "adapter": lambda: nn.Sequential(nn.Linear(size, 2), nn.ReLU(), nn.Linear(2, size)),
        "norm without parameters": lambda: nn.BatchNorm1d(size, affine=False),
        "norm": lambda: nn.BatchNorm1d(size),
    }[kind]()
    run.model.last = _With(last, extra)
    if parameters := list(extra.parameters()):
        run.optimizer.add_param_group({"params": parameters})
        run.stale = True
    if apart:  # until the next pass, DDP does not know of it
        run.one_pass()


@action("between", how=("added", "grown", "float", "none"))
def new_buffer(run: Run, how: str) -> None:
    """A buffer is made late, or becomes larger."""
    if not any(True for _ in run.model.buffers()):  # then DDP shares none that come later
        return
    made = run.memory["buffers"] = run.memory.get("buffers", 0) + 1
    if how == "none":
        run.model.register_buffer("nothing", None)
    elif how == "grown":
        run.model.register_buffer("history", torch.zeros(made))
    else:
        run.model.register_buffer(f"extra{made}", torch.full((2,), 1.0 + run.rank))


@action("between", how=("in turn", "reversed", "to a new one", "swap two", "same list"))
def regroup(run: Run, how: str) -> None:
    """Parameters change places between groups and within them."""
    groups = run.optimizer.param_groups
    if run.loop.optimizer == "lbfgs":
        return
    if how == "reversed":
        groups[0]["params"].reverse()
    elif how == "same list":
        groups[0]["params"] = list(groups[0]["params"])
    elif how == "to a new one" and len(groups[0]["params"]) > 1:
        moved = groups[0]["params"].pop()
        run.optimizer.add_param_group({"params": [moved], "lr": 0.003})
    elif len(groups) > 1:
        one, other = groups[0], groups[-1]
        if how == "swap two":
            one["params"], other["params"] = other["params"], one["params"]
        elif one["params"]:
            other["params"].append(one["params"].pop(0))


@action("between", how=("lr", "decay", "momentum", "lr of one", "maximize"))
def set_options(run: Run, how: str) -> None:
    """Settings of groups change."""
    for group in run.optimizer.param_groups[: 1 if how == "lr of one" else None]:
        if how.startswith("lr"):
            lr = group["lr"]
            group["lr"] = lr * 0.5
        elif how == "decay" and "weight_decay" in group:
            group["weight_decay"] = 0.05
        elif how == "momentum" and "momentum" in group and not group.get("nesterov"):
            group["momentum"] = 0.5
        elif how == "maximize" and "maximize" in group:
            group["maximize"] = not group["maximize"]


@action("between", place=_PLACES)
def drop_from_optimizer(run: Run, place: int) -> None:
    """The optimizer no longer holds a parameter, which is trained no more."""
    p = run.parameter(place)
    found = _positions(run.optimizer).get(id(p))
    if found is not None and len(_positions(run.optimizer)) > 2 and run.loop.optimizer != "lbfgs":
        run.has_orphans = True
        del found[0]["params"][found[1]]


@action("between")
def new_optimizer(run: Run) -> None:
    """Another one takes the place of the optimizer."""
    run.set_optimizer(run.new_optimizer())
    run.arm.exchange(run.model, run.optimizer)
    run.scheduler = None


@action("between")
def wrap_anew(run: Run) -> None:
    run.stale = True
