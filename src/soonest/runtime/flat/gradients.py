"""How gradients come into the flat buffers, wherever autograd or the user has put them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from soonest.errors import SoonestError
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.flat.buffers import FlatBuffers
from soonest.runtime.flat.param import FlatParam, changed
from soonest.runtime.flat.storage import has_alias
from soonest.runtime.guard import pending


class Gradients:
    """Puts the gradients of all parameters into the flat buffers, divided for an average.

    They are divided before they are summed, as DDP does: so results are DDP's to the last bit, and
    no partial sum is larger than the largest gradient, which a narrow dtype could not hold.

    Args:
        layout: the flat buffers.
        ranks: over how many gradients are averaged.
        failures: told of a gradient that cannot be sent, as the other ranks would wait for it.
    """

    def __init__(self, layout: FlatBuffers, ranks: int, failures: FailureReporter) -> None:
        self._layout = layout
        self._failures = failures
        self._divisor = 0
        self.divide_by(ranks)

    def divide_by(self, ranks: int) -> None:
        """Lets reduced gradients be sums over all ranks divided by this number from now on."""
        if ranks == self._divisor:  # a device would be asked for nothing
            return
        self._divisor = ranks
        # Tensors, not numbers: a device need not be sent one with each gradient.
        self._factors = [
            torch.tensor(
                1.0 / ranks,
                dtype=torch.promote_types(grads.dtype, torch.float32),
                device=grads.device,
            )
            for grads in self._layout.grads
        ]

    def take(self, param: FlatParam, *, fresh: bool) -> Tensor | None:
        """Puts ``parameter.grad`` into the flat buffer, divided.

        The tensor in the buffer then takes its place, unless the user has the other one elsewhere.

        Args:
            param: whose.
            fresh: ``parameter.grad`` was None before this backward pass.

        Returns:
            The user's own tensor, if it is to have the reduced value, too.

        Raises:
            ValueError: it is sparse.
            SoonestError: it is of another dtype, shape or device than in the buffer.
        """
        gradient = param.parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            sparse = f"the gradient of {param.name!r} is sparse and cannot be reduced"
            raise self._failures.at_fault(
                ValueError(f"{sparse}: use dense gradients (sparse=False)")
            )
        if gradient is param.grad:
            self._take_back(param)
            param.raw_grad.mul_(self._factors[param.flat])
            return None
        kept = sys.getrefcount(gradient) > _NAMES or (not fresh and has_alias(gradient))
        if gradient.dtype != param.raw_grad.dtype:
            raise self._failures.at_fault(_of_another_dtype(param, gradient))
        try:
            # Detached for the sake of backward(create_graph=True).
            torch.mul(gradient.detach(), self._factors[param.flat], out=param.raw_grad)
            if kept:
                return gradient
            param.parameter.grad = param.grad
        except RuntimeError as error:
            raise self._failures.at_fault(changed(param)) from error
        return None

    def of(
        self,
        params: Iterable[FlatParam],
        unknown: Collection[int],
        copies: Mapping[int, Tensor],
        *,
        scaled: bool = False,
    ) -> dict[int, Tensor | None]:
        """Finds the gradients that the optimizer is to use; None stands for the one in the buffer.

        Args:
            params: whose.
            unknown: orders of those of which another rank may have one; see ``InFlight``.
            copies: the user's own tensors that are still to be given the values in the buffer.
            scaled: the optimizer divides them by a scale, in place.

        Raises:
            SoonestError: they are scaled, and two of them are one tensor.
        """
        found: dict[int, Tensor | None] = {}
        with pending.DisableGuard():
            for param in params:
                gradient = param.parameter.grad
                if gradient is None:
                    if param.order in unknown:
                        found[param.order] = None
                elif gradient is param.grad:
                    self._take_back(param)
                    found[param.order] = None
                elif copies.get(param.order) is gradient:
                    found[param.order] = None
                else:
                    found[param.order] = gradient
        if any(gradient is not None for gradient in found.values()):
            self._separate(found, scaled)
        return found

    def _separate(self, found: dict[int, Tensor | None], scaled: bool) -> None:
        """Clones gradients that belong to another parameter, too: an update may change its own."""
        places = self._places()
        for order, gradient in found.items():
            if gradient is None:
                continue
            place = _place(gradient)
            if scaled and place in places:
                raise self._failures.at_fault(
                    SoonestError(
                        f"{self._layout.params[order].name!r} has been given the gradient of "
                        f"{places[place]!r}, and a fused optimizer under a GradScaler would divide "
                        "it by the scale twice: give it a copy, as in p.grad = q.grad.clone()"
                    )
                )
            if place in places:
                pending.wait_for(gradient)
                found[order] = gradient.detach().clone()
            elif scaled:
                places[place] = self._layout.params[order].name

    def check_own(self, param: FlatParam, gradient: Tensor) -> None:
        """Raises SoonestError if a gradient that is about to be added to is another's, too."""
        other = self._places().get(_place(gradient))
        if other is not None:
            raise self._failures.at_fault(
                SoonestError(
                    f"{param.name!r} has been given the gradient of {other!r} as its own, so both "
                    "would be added up in one tensor: give it a copy, as in p.grad = q.grad.clone()"
                )
            )

    def _places(self) -> dict[int, str]:
        """The parameter of each gradient in the buffers, by the gradient's storage."""
        with pending.DisableGuard():
            return {_place(param.grad): param.name for param in self._layout.params}

    def _take_back(self, param: FlatParam) -> None:
        """Brings a gradient back into the buffer if the user has given it other memory."""
        if param.grad.data_ptr() != param.grad_address:
            self._layout.take_back_gradient(param)


def _place(gradient: Tensor) -> int:
    with pending.DisableGuard():
        return gradient.untyped_storage()._cdata


def _of_another_dtype(param: FlatParam, gradient: Tensor) -> SoonestError:
    return SoonestError(
        f"the gradient of {param.name!r} is {gradient.dtype}, but its parameter was "
        f"{param.raw_grad.dtype} when prioritize was called, and gradients are reduced as such: "
        "leave its grad_dtype alone, or detach() the handle and call prioritize again"
    )


def _names_of_a_gradient() -> int:
    """Counts Python's references to a gradient that only its parameter has."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    gradient = parameter.grad
    return sys.getrefcount(gradient)


_NAMES = _names_of_a_gradient()
