"""A bucket as a view of the flat buffers, and the dtypes in which it is sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Wire:
    """The dtypes in which gradients and parameters are sent; None stands for their own.

    Args:
        gradients: where the backend sums, partial sums are rounded to it; where this rank does,
            they accumulate in float32.
        parameters: of which each rank updates its shard and sends it to the others.
    """

    gradients: torch.dtype | None = None
    parameters: torch.dtype | None = None

    def of(self, itemsize: int) -> Wire:
        """The same, without dtypes that are not narrower than elements of so many bytes."""

        def narrower(dtype: torch.dtype | None) -> torch.dtype | None:
            return dtype if dtype and dtype.itemsize < itemsize else None

        return Wire(narrower(self.gradients), narrower(self.parameters))


EXACT = Wire()
"""Everything is sent in its own dtype."""


@dataclass(frozen=True)
class Piece:
    """One bucket's part of the buffers of this rank.

    Args:
        gradients: contiguous, of any floating dtype, ``numel`` elements.
        parameters: the same part of the buffer of parameters.
        wire: how they are sent.
        itemsize: bytes of an element by which the ranks' parts are aligned, if not its own.
    """

    gradients: Tensor
    parameters: Tensor
    wire: Wire = EXACT
    itemsize: int | None = None

    def packed(self, part: slice = slice(None)) -> Tensor:
        """Gradients in the dtype in which they are sent; a view if that is their own."""
        wire = self.wire.gradients
        return self.gradients[part].to(wire) if wire else self.gradients[part]

    def unpack(self, received: Tensor, part: slice = slice(None)) -> None:
        """Overwrites gradients by what was sent, on the sender, too: so all ranks have the same."""
        if self.wire.gradients:
            self.gradients[part].copy_(received)
