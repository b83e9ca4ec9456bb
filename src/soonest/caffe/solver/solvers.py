"""Caffe's solvers as optimizers of torch.

They differ from those of torch where Caffe does: the rate is inside the momentum, weight decay goes
into the gradient for every one of them, and Adam adds its delta to the root that is not corrected.
Each updates every parameter by itself: prioritize them with ``separable=True``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from soonest.caffe.proto.message import Message


class CaffeSolver(Optimizer):
    """What all have in common: scaling and decay of the gradient, histories.

    Args:
        params: parameters or groups, as for any optimizer.
        lr: the rate; per group, times its ``lr_mult``.
        momentum: as in Caffe; for AdaDelta the decay of both averages, for Adam of the first.
        momentum2: Adam's second decay.
        rms_decay: RMSProp's.
        delta: what is added to a root.
        weight_decay: of the group.
        l1: whether the decay is towards zero at a constant pace.
        clip_scale: by which gradients are multiplied first.
        iter_size: by which they are divided next.

    Raises:
        ValueError: the solver has no momentum, but it was given one; or a setting is out of range.
    """

    histories: ClassVar[int] = 1
    """How many values it remembers for each of a parameter."""
    has_momentum: ClassVar[bool] = True
    shares: ClassVar[tuple[str, ...]] = ()
    """Which settings must be from 0 up and below 1."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.0,
        momentum2: float = 0.999,
        rms_decay: float = 0.99,
        delta: float = 1e-8,
        weight_decay: float = 0.0,
        l1: bool = False,
        clip_scale: float = 1.0,
        iter_size: int = 1,
    ) -> None:
        if momentum and not self.has_momentum:
            raise ValueError(f"{type(self).__name__} has no momentum: leave it out")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "momentum2": momentum2,
                "rms_decay": rms_decay,
                "delta": delta,
                "weight_decay": weight_decay,
                "l1": l1,
                "clip_scale": clip_scale,
                "iter_size": iter_size,
            },
        )
        for name in self.shares:
            if not 0 <= self.defaults[name] < 1:
                raise ValueError(
                    f"{name} is {self.defaults[name]:g}: {type(self).__name__} needs 0 or more, "
                    "below 1"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    for name in self.history_names():
                        state[name] = torch.zeros_like(parameter)
                state["step"] += 1
                self._update(parameter, _gradient(parameter, group), state, group)
        return loss

    @classmethod
    def history_names(cls) -> list[str]:
        """Keys of the state, in the order in which Caffe stores them."""
        return ["history", "history2"][: cls.histories]

    def _update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        raise NotImplementedError


def _gradient(parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """Caffe's order: clip, divide by the number of passes, decay. The stored one is not changed."""
    gradient = parameter.grad
    assert gradient is not None
    if group["clip_scale"] != 1:
        gradient = gradient * group["clip_scale"]
    if group["iter_size"] != 1:
        gradient = gradient / group["iter_size"]
    if group["weight_decay"]:
        towards = parameter.sign() if group["l1"] else parameter
        gradient = gradient.add(towards, alpha=group["weight_decay"])
    return gradient


class SGD(CaffeSolver):
    """h = momentum·h + rate·gradient; that is the step."""

    def _update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        history = state["history"]
        history.mul_(group["momentum"]).add_(gradient, alpha=group["lr"])
        parameter.sub_(history)


class Nesterov(CaffeSolver):
    """As SGD, but the step is (1 + momentum)·h - momentum·h of before."""

    def _update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        history, momentum = state["history"], group["momentum"]
        parameter.add_(history, alpha=momentum)
        history.mul_(momentum).add_(gradient, alpha=group["lr"])
        parameter.sub_(history, alpha=1 + momentum)


class AdaGrad(CaffeSolver):
    """h = h + gradient²; the step is rate·gradient / (√h + delta)."""

    has_momentum = False

    def _update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        history = state["history"]
        history.addcmul_(gradient, gradient)
        parameter.addcdiv_(gradient, history.sqrt().add_(group["delta"]), value=-group["lr"])


class RMSProp(CaffeSolver):
    """As AdaGrad, with a running mean of squares for their sum."""

    has_momentum = False
    shares = ("rms_decay",)

    def _update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        history, decay = state["history"], group["rms_decay"]
        history.mul_(decay).addcmul_(gradient, gradient, value=1 - decay)
        parameter.addcdiv_(gradient, history.sqrt().add_(group["delta"]), value=-group["lr"])


class AdaDelta(CaffeSolver):
    """Running means of squared gradients and of squared steps, these before the rate."""

    histories = 2

    def _update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        first, second = state["history"], state["history2"]
        momentum, delta = group["momentum"], group["delta"]
        first.mul_(momentum).addcmul_(gradient, gradient, value=1 - momentum)
        step = ((second + delta) / (first + delta)).sqrt_().mul_(gradient)
        second.mul_(momentum).addcmul_(step, step, value=1 - momentum)
        parameter.sub_(step, alpha=group["lr"])


class Adam(CaffeSolver):
    """Delta is added to the root of the uncorrected mean of squares."""

    histories = 2
    shares = ("momentum", "momentum2")

    def _update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        first, second = state["history"], state["history2"]
        one, two, count = group["momentum"], group["momentum2"], float(state["step"])
        first.mul_(one).add_(gradient, alpha=1 - one)
        second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
        correction = math.sqrt(1 - two**count) / (1 - one**count)
        root = second.sqrt().add_(group["delta"])
        parameter.addcdiv_(first, root, value=-group["lr"] * correction)


SOLVERS: dict[str, type[CaffeSolver]] = {
    cls.__name__: cls for cls in (SGD, Nesterov, AdaGrad, RMSProp, AdaDelta, Adam)
}
"""Per type as prototxt has it, its class."""


def make(solver: Message, learned: Sequence[tuple[Tensor, float]]) -> CaffeSolver:
    """The optimizer that a ``SolverParameter`` asks for.

    Args:
        solver: the message.
        learned: every blob that is learned, with its ``decay_mult``; each becomes a group.

    Raises:
        ValueError: there is no such type, or it cannot be made so.
    """
    if solver.type not in SOLVERS:
        raise ValueError(f"no solver {solver.type!r} exists: take one of {', '.join(SOLVERS)}")
    if solver.regularization_type not in ("L1", "L2"):
        raise ValueError(f"regularization_type is {solver.regularization_type!r}: take L1 or L2")
    groups: list[dict[str, Any]] = [
        {"params": [blob], "weight_decay": solver.weight_decay * decay_mult}
        for blob, decay_mult in learned
    ]
    return SOLVERS[solver.type](
        groups or [{"params": []}],
        solver.base_lr,
        momentum=solver.momentum,
        momentum2=solver.momentum2,
        rms_decay=solver.rms_decay,
        delta=solver.delta,
        weight_decay=solver.weight_decay,
        l1=solver.regularization_type == "L1",
        iter_size=solver.iter_size,
    )


def clip_scale(solver: Message, gradients: Sequence[Tensor | None]) -> tuple[float, float | None]:
    """By which gradients are multiplied so that their norm is not above ``clip_gradients``.

    Args:
        solver: the message.
        gradients: of all blobs that are learned; None where there is none.

    Returns:
        The factor, at most one, and the L2 norm of all gradients together if it is above that.
    """
    most = solver.clip_gradients
    if most < 0:
        return 1.0, None
    norm = torch.nn.utils.get_total_norm([one for one in gradients if one is not None]).item()
    return (1.0, None) if norm <= most else (most / norm, norm)
