"""How the learning rate goes: Caffe's policies."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from soonest.caffe.proto.message import Message, to_float32


class Rate:
    """The learning rate of a solver.

    Args:
        solver: a ``SolverParameter``.

    Attributes:
        step: how many steps the rate has taken; solvers' states keep it.

    Raises:
        ValueError: there is no such policy, or what it needs is missing.
    """

    def __init__(self, solver: Message) -> None:
        if solver.lr_policy not in POLICIES:
            raise ValueError(
                f"no lr_policy {solver.lr_policy!r} exists: take one of {', '.join(POLICIES)}"
            )
        if solver.lr_policy in ("exp", "inv", "sigmoid", "step", "multistep") and solver.gamma < 0:
            raise ValueError(
                f"gamma is {solver.gamma:g}: lr_policy {solver.lr_policy!r} needs 0 up"
            )
        if solver.lr_policy == "step" and solver.stepsize < 1:
            raise ValueError("lr_policy 'step' needs a stepsize above 0")
        if solver.lr_policy == "poly" and solver.max_iter < 1:
            raise ValueError("lr_policy 'poly' needs a max_iter above 0")
        self._solver = solver
        self.step = 0

    def at(self, iteration: int) -> float:
        """The rate of an iteration; ask for them in order."""
        solver = self._solver
        if solver.lr_policy == "step":
            self.step = iteration // solver.stepsize
        elif solver.lr_policy == "multistep":
            values = list(solver.stepvalue)
            while self.step < len(values) and iteration >= values[self.step]:
                self.step += 1
        with np.errstate(all="ignore"):
            rate = float(solver.base_lr * POLICIES[solver.lr_policy](solver, iteration, self.step))
        # Beyond float32 it is infinite, as in Caffe, and not an error.
        return float(to_float32(rate)) if abs(rate) > 1e38 else rate


def _stepped(solver: Message, iteration: int, step: int) -> float:
    return np.float64(solver.gamma) ** step


def _sigmoid(solver: Message, iteration: int, step: int) -> float:
    exponent = -solver.gamma * (iteration - solver.stepsize)
    return 0.0 if exponent > 700 else 1 / (1 + math.exp(exponent))


def _poly(solver: Message, iteration: int, step: int) -> float:
    return np.float64(max(0.0, 1 - iteration / solver.max_iter)) ** solver.power


POLICIES: dict[str, Callable[[Message, int, int], float]] = {
    "fixed": lambda solver, iteration, step: 1.0,
    "step": _stepped,
    "exp": lambda solver, iteration, step: np.float64(solver.gamma) ** iteration,
    "inv": lambda solver, iteration, step: (
        np.float64(1 + solver.gamma * iteration) ** -solver.power
    ),
    "multistep": _stepped,
    "poly": _poly,
    "sigmoid": _sigmoid,
}
"""Per policy, by what the base rate is multiplied, from solver, iteration and steps taken."""
