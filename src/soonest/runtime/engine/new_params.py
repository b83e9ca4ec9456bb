"""Parameters that come to be trained while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from soonest.runtime import comm
from soonest.runtime.comm import Ranks
from soonest.runtime.flat.param import FlatParam


class Newcomers:
    """Looks out for them in one model.

    Args:
        model: whose parameters.
        without: names of parameters to leave alone.
        ours: whether a parameter that comes to be trained belongs to this engine; others may train
            other parts of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        without: Collection[str],
        ours: Callable[[nn.Parameter], bool],
    ) -> None:
        self._model = model
        self._without = without
        self._ours = ours
        self._waiting: list[nn.Parameter] = []

    def look(self, params: Iterable[FlatParam]) -> list[nn.Parameter]:
        """Those that may come: all of the model as it is now, but these parameters."""
        known = {id(param.parameter) for param in params}
        self._waiting = [
            parameter
            for name, parameter in self._model.named_parameters()
            if id(parameter) not in known and name not in self._without and _may_train(parameter)
        ]
        return self._waiting

    def come(self) -> list[nn.Parameter]:
        """Those that are to be trained by now."""
        return [p for p in self._waiting if p.requires_grad and self._ours(p)]


def _may_train(parameter: nn.Parameter) -> bool:
    """Whether it can require a gradient at all; quantized ones, say, cannot."""
    plain = type(parameter).__torch_function__ is torch._C._disabled_torch_function_impl
    numbers = parameter.is_floating_point() or parameter.is_complex()
    return plain and numbers and not (is_lazy(parameter) or parameter.is_inference())


def admit(ranks: Ranks, parameters: Sequence[nn.Parameter]) -> None:
    """Gives every rank the first rank's values, and reduces gradients; a collective call."""
    group = ranks.group
    here = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    comm.broadcast(group, parameters)
    comm.sum_small(group, here)
    with torch.no_grad():
        for parameter, users in zip(parameters, here.tolist(), strict=True):
            if users:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradient = _as_real(parameter.grad)
                gradient.mul_(torch.tensor(1.0 / group.size()))
                comm.reduce("allreduce", ranks, gradient)


def _as_real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
