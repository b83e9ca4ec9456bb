"""Optimizers and schedulers that a loop may have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer, lr_scheduler

Groups = list[dict[str, Any]]


class Signs(Optimizer):
    """Not one of torch's: follows the sign of an average, and counts its steps on itself."""

    steps = 0

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["average"] = 0.9 * state.get("average", 0.0) + p.grad
                    p.add_(state["average"].sign(), alpha=-group["lr"] / self.steps)
        return loss


class Lookahead:
    """An optimizer around another, which is none itself: every second step goes back halfway."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.slow: dict[nn.Parameter, Tensor] = {}
        self.steps = 0

    @property
    def param_groups(self) -> Groups:
        return self.optimizer.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.steps % 2:
            return loss
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.slow.setdefault(p, p.data.clone())
                if slow.shape == p.shape and slow.dtype == p.dtype:
                    slow.add_(p.data - slow, alpha=0.5)
                    p.data.copy_(slow)
        return loss


OPTIMIZERS: dict[str, Callable[[Groups], Optimizer]] = {
    "sgd": lambda g: optim.SGD(g, lr=0.05),
    "sgd, momentum": lambda g: optim.SGD(g, lr=0.05, momentum=0.9),
    "sgd, nesterov, decay": lambda g: optim.SGD(
        g, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "sgd, foreach": lambda g: optim.SGD(g, lr=0.05, momentum=0.9, foreach=True),
    "sgd, one by one": lambda g: optim.SGD(g, lr=0.05, momentum=0.9, foreach=False),
    "sgd, fused": lambda g: optim.SGD(g, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda g: optim.Adam(g, lr=0.01),
    "adamw": lambda g: optim.AdamW(g, lr=0.01, eps=1e-3),
    "adamw, foreach": lambda g: optim.AdamW(g, lr=0.01, foreach=True),
    "adamw, fused": lambda g: optim.AdamW(g, lr=0.01, fused=True),
    "adam, amsgrad, tensor lr": lambda g: optim.Adam(g, lr=torch.tensor(0.01), amsgrad=True),
    "rmsprop": lambda g: optim.RMSprop(g, lr=0.01, momentum=0.5, eps=1e-3),
    "adagrad": lambda g: optim.Adagrad(g, lr=0.05),
    "adadelta": lambda g: optim.Adadelta(g, lr=0.5),
    "nadam": lambda g: optim.NAdam(g, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1),
    "own": lambda g: Signs(g),
    "lbfgs": lambda g: optim.LBFGS([p for one in g for p in one["params"]], max_iter=2, lr=0.1),
}
CLOSURE_ONLY = ("lbfgs",)


def groups_of(parameters: Iterable[nn.Parameter], how: str) -> Groups:
    """The parameters in groups.

    Args:
        parameters: all of them.
        how: ``one`` group, ``two`` in turn, one ``each``, or by ``size`` of shape.
    """
    held = list(parameters)
    if how == "two":
        return [
            {"params": held[::2], "weight_decay": 0.1},
            {"params": held[1::2], "lr": 0.02},
        ]
    if how == "each":
        return [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(held)]
    if how == "size":
        matrices = [p for p in held if p.dim() > 1]
        return [
            {"params": matrices, "weight_decay": 0.1},
            {"params": [p for p in held if p.dim() <= 1], "weight_decay": 0.0},
        ]
    return [{"params": held}]


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=60, cycle_momentum=False),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
}
