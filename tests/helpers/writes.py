"""Ways to write to a model's parameters and gradients early, while they are still in flight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from helpers.reads import Zoo, weight

Write = Callable[[Zoo, Optimizer], Any]


def in_place(change: Callable[[Tensor], Any]) -> Write:
    def write(model: Zoo, optimizer: Optimizer) -> None:
        with torch.no_grad():
            change(weight(model))

    return write


def to_data(change: Callable[[Tensor], Tensor]) -> Write:
    """Gives the parameter other memory."""

    def write(model: Zoo, optimizer: Optimizer) -> None:
        weight(model).data = change(weight(model).data)

    return write


def of_gradient(change: Callable[[Any], Any]) -> Write:
    def write(model: Zoo, optimizer: Optimizer) -> None:
        change(weight(model).grad)

    return write


def set_gradient(change: Callable[[Any], Any]) -> Write:
    def write(model: Zoo, optimizer: Optimizer) -> None:
        weight(model).grad = change(weight(model).grad)

    return write


def set_part(tensor: Tensor) -> None:
    tensor[1:] = 0.25


def halved(model: Zoo) -> dict[str, Tensor]:
    return {name: value * 0.5 for name, value in model.state_dict().items()}


def from_vector(model: Zoo, optimizer: Optimizer) -> None:
    values = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(values * 0.5, model.parameters())


def foreach(model: Zoo, optimizer: Optimizer) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.5)


def initialise(model: Zoo, optimizer: Optimizer) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.3)


# After step()
WRITES: dict[str, Write] = {
    "mul_, add_": in_place(lambda p: p.mul_(0.5).add_(0.1)),
    "copy_": in_place(lambda p: p.copy_(torch.eye(4))),
    "clamp_": in_place(lambda p: p.clamp_(-0.1, 0.1)),
    "*=": in_place(lambda p: p.__imul__(0.5)),
    "item assignment": in_place(set_part),
    "zero_": in_place(lambda p: p.zero_()),
    "out=": in_place(lambda p: torch.mul(torch.ones(4, 4), 0.2, out=p)),
    "foreach": foreach,
    "nn.init": in_place(lambda p: nn.init.constant_(p, 0.2)),
    "nn.init of modules": initialise,
    "data.fill_": lambda m, o: weight(m).data.fill_(0.3),
    "data[0] =": lambda m, o: weight(m).data.__setitem__(0, 0.3),
    "detach().mul_": lambda m, o: weight(m).detach().mul_(0.5),
    "numpy": lambda m, o: weight(m).detach().numpy().fill(0.3),
    "load_state_dict": lambda m, o: m.load_state_dict(halved(m)),
    "load_state_dict of a module": lambda m, o: m.linear.load_state_dict(
        {"weight": torch.eye(4), "bias": torch.ones(4)}
    ),
}

# After step(), too, but the parameter gets other memory
MOVES: dict[str, Write] = {
    "data =": to_data(lambda data: torch.full((4, 4), 0.3)),
    "data = data.clone()": to_data(lambda data: data.clone()),
    "set_": in_place(lambda p: p.set_(torch.full((4, 4), 0.4))),  # type: ignore[call-overload]
    "vector_to_parameters": from_vector,
    "double and back": lambda m, o: m.double().float(),
    "share_memory": lambda m, o: m.share_memory(),
}

# Between backward() and step()
GRADIENT_WRITES: dict[str, Write] = {
    "grad.pow_": of_gradient(lambda g: g.pow_(3)),
    "grad.fill_": of_gradient(lambda g: g.fill_(0.5)),
    "grad.add_": of_gradient(lambda g: g.add_(0.1)),
    "grad.clamp_": of_gradient(lambda g: g.clamp_(-1e-3, 1e-3)),
    "grad[0] =": of_gradient(lambda g: g.__setitem__(0, 0.5)),
    "grad.copy_": of_gradient(lambda g: g.copy_(torch.eye(4))),
    "grad.data.fill_": of_gradient(lambda g: g.data.fill_(0.5)),
    "grad.data =": of_gradient(lambda g: setattr(g, "data", g.data.pow(3))),
    "grad = grad * 2": set_gradient(lambda g: g * 2),
    "clip_grad_norm_": lambda m, o: nn.utils.clip_grad_norm_(m.parameters(), 1e-3),
    "clip_grad_value_": lambda m, o: nn.utils.clip_grad_value_(m.parameters(), 1e-3),
}

# The same, but nothing is read that could be stale: what is in flight is left behind
REPLACED: dict[str, Write] = {
    "grad = None": set_gradient(lambda g: None),
    "grad = another": set_gradient(lambda g: torch.eye(4)),
    "grad.zero_": of_gradient(lambda g: g.zero_()),
    "zero_grad": lambda m, o: o.zero_grad(),
    "zero_grad to zeros": lambda m, o: o.zero_grad(set_to_none=False),
    "zero_grad of the model": lambda m, o: m.zero_grad(),
}
