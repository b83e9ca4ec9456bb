"""How gradients come into the flat buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from soonest.runtime import guard
from soonest.runtime.layout import Layout, Member, changed
from soonest.runtime.peers import Peers


class Gradients:
    """Those of a layout's members, wherever autograd or the user has put them.

    Args:
        layout: the flat buffers.
        ranks: over how many they are combined.
        peers: told of what is wrong with one, as they would wait for it.
    """

    def __init__(self, layout: Layout, ranks: int, peers: Peers) -> None:
        self._layout = layout
        self._peers = peers
        self._divisor = 0
        self.divide_by(ranks)

    def divide_by(self, ranks: int) -> None:
        """From now on, combined gradients are sums over all ranks divided by this number."""
        if ranks == self._divisor:  # a device would be asked for nothing
            return
        self._divisor = ranks
        # What to multiply by: as a tensor, and not a number, it is ready for use.
        self._shares = [
            torch.tensor(
                1.0 / ranks,
                dtype=torch.promote_types(grads.dtype, torch.float32),
                device=grads.device,
            )
            for grads in self._layout.grads
        ]

    def take(self, member: Member) -> None:
        """Puts ``parameter.grad`` into the flat buffer, divided as DDP does before it sums.

        Raises:
            ValueError: it is sparse.
            SoonestError: it is of another dtype, shape or device than in the buffer.
        """
        gradient = member.parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            sparse = f"the gradient of {member.name!r} is sparse and cannot be combined"
            raise self._peers.at_fault(ValueError(f"{sparse}: use dense gradients (sparse=False)"))
        self._take_back(member)
        if torch.is_grad_enabled():  # backward(create_graph=True)
            gradient = gradient.detach()
        if gradient is member.grad:
            member.raw_grad.mul_(self._shares[member.flat])
            return
        try:
            torch.mul(gradient, self._shares[member.flat], out=member.raw_grad)
            member.parameter.grad = member.grad
        except RuntimeError as error:
            raise self._peers.at_fault(changed(member)) from error

    def of(self, members: Iterable[Member], unknown: Collection[int]) -> dict[int, Tensor]:
        """By order of the member, the gradients that the optimizer is to use.

        Args:
            members: whose.
            unknown: orders of those of which another rank may have one; see ``Landing``.
        """
        found: dict[int, Tensor] = {}
        with guard.DisableGuard():
            for member in members:
                gradient = member.parameter.grad
                if gradient is member.grad:
                    self._take_back(member)
                if gradient is None and member.order in unknown:
                    gradient = member.grad
                if gradient is not None:
                    found[member.order] = gradient
        return found

    def _take_back(self, member: Member) -> None:
        """The user may have given the gradient in the buffer other memory."""
        if member.grad.data_ptr() != member.grad_address:
            self._layout.take_back_gradient(member)
