"""One bucket's part of the buffers, and how it is sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Wire:
    """The dtypes in which things are sent; None stands for their own.

    Args:
        gradients: sums are rounded to it in between where the backend makes them, and accumulate
            in float32 where this rank does.
        parameters: that ranks share out.
    """

    gradients: torch.dtype | None = None
    parameters: torch.dtype | None = None

    def of(self, itemsize: int) -> Wire:
        """For elements of so many bytes: dtypes that are no narrower are left out."""

        def narrower(dtype: torch.dtype | None) -> torch.dtype | None:
            return dtype if dtype and dtype.itemsize < itemsize else None

        return Wire(narrower(self.gradients), narrower(self.parameters))


EXACT = Wire()


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
        """Gradients as they are sent."""
        wire = self.wire.gradients
        return self.gradients[part].to(wire) if wire else self.gradients[part]

    def unpack(self, received: Tensor, part: slice = slice(None)) -> None:
        """Takes over what was sent; equal on every rank, as the sender takes it over as well."""
        if self.wire.gradients:
            self.gradients[part].copy_(received)
