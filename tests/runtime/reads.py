"""Ways to read a model right after ``optimizer.step()``, while its updates are still in flight."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import soonest
from runtime.steering import keep_to_the_usual_plan
from soonest.runtime import engine, guard, program


class Unseen(torch.autograd.Function):
    """What is passed to ``apply`` does not pass ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.detach().clone().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, gradient.T @ torch.ones(gradient.shape[0], 4)


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return Unseen.apply(x, self.weight)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Opaque(), nn.Linear(4, 4))


def average(model: nn.Module) -> Tensor:
    ema = [torch.zeros_like(p) for p in model.parameters()]
    torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 0.5)
    return torch.cat([value.flatten() for value in ema])


def flat(values: Any) -> Tensor:
    return torch.cat([value.detach().flatten().clone() for value in values])


def gradient(module: nn.Module) -> dict[str, Tensor]:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, torch.ones(1, 4)).square().sum()

    return torch.func.grad(loss)(dict(module.named_parameters()))


READS: dict[str, Callable[[nn.Sequential, torch.optim.Optimizer], Tensor]] = {
    "forward": lambda m, o: m(torch.ones(1, 4)),
    "a module alone": lambda m, o: m[0](torch.ones(1, 4)),
    "autograd.Function.apply": lambda m, o: m[1](torch.ones(1, 4)),
    "evaluation": lambda m, o: m.eval()(torch.ones(1, 4)),
    "state_dict": lambda m, o: flat(m.state_dict().values()),
    "parameters": lambda m, o: flat(m.parameters()),
    "EMA": lambda m, o: average(m),
    "deepcopy of the model": lambda m, o: flat(copy.deepcopy(m).parameters()),
    "functional_call": lambda m, o: torch.func.functional_call(
        m, dict(m.named_parameters()), torch.ones(1, 4)
    ),
    "functional_call under grad": lambda m, o: gradient(m[0])["weight"],
    "norm": lambda m, o: nn.utils.get_total_norm(list(m.parameters())),
    "optimizer.state": lambda m, o: flat(s["exp_avg"] for s in o.state.values()),
    "optimizer.state_dict": lambda m, o: flat(
        s["exp_avg"] for s in o.state_dict()["state"].values()
    ),
    "deepcopy of the optimizer": lambda m, o: flat(
        s["exp_avg"] for s in copy.deepcopy(o).state.values()
    ),
}


def stale_reads(guard_on: bool) -> dict[str, bool]:
    """Per way to read, whether it gave another value than after everything has landed."""
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    keep_to_the_usual_plan()
    handle = soonest.prioritize(model, optimizer)
    while not handle.settled:  # planning waits for everything
        step(model, optimizer)
    flush = engine.Engine.flush
    update = program.Program.update

    def slow(self: Any, *args: Any) -> None:
        time.sleep(0.1)
        update(self, *args)

    program.Program.update = slow  # type: ignore[method-assign]
    if not guard_on:
        guard.Hold.take_off = lambda self: None  # type: ignore[method-assign]
        engine.Engine.flush = lambda self: None  # type: ignore[method-assign]
    found: dict[str, bool] = {}
    for name, read in READS.items():
        model.train()
        step(model, optimizer)
        early = read(model, optimizer).detach().clone()
        flush(handle._engine)  # type: ignore[arg-type]
        found[name] = not torch.equal(early, read(model, optimizer).detach())
    return found


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
