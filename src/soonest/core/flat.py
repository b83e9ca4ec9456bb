"""The flat buffers that a plan divides: where each parameter lies in one.

All parameters of one dtype lie one behind the other in a single tensor, in the order in which the
forward pass first uses them, and so do their gradients in another. So any slice of it can be sent
without copying, whether it holds many small parameters or a part of a large one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ALIGN_BYTES = 64
"""Parameters start at multiples of this, as in torch's own allocator: kernels round alike."""


def borders(numel: int, ranks: int, itemsize: int) -> list[int]:
    """Where the ranks' parts of a slice begin and end: equal, aligned, the last ones shorter.

    Args:
        numel: elements of the slice.
        ranks: how many parts.
        itemsize: bytes of one element.

    Returns:
        ``ranks + 1`` elements, from 0 to ``numel``.
    """
    align = max(1, ALIGN_BYTES // itemsize)
    part = -(-numel // (ranks * align)) * align
    return [min(rank * part, numel) for rank in range(ranks + 1)]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one parameter lives in a flat buffer.

    The element behind its last one, at ``start + numel``, belongs to it too. In the gradient buffer
    it counts the ranks that used the parameter, so that this knowledge travels with the gradient.

    Args:
        name: of the parameter, as in ``model.named_parameters()``.
        layer: of the module that owns it.
        start: first element, a multiple of the alignment.
        numel: elements of the parameter.
    """

    name: str
    layer: str
    start: int
    numel: int

    @property
    def count_at(self) -> int:
        """Element that counts the ranks that used the parameter."""
        return self.start + self.numel


@dataclass(frozen=True)
class Flat:
    """A flat buffer: the slots of all parameters of one dtype, in order of first use.

    Args:
        dtype: as torch names it, for example ``float32``.
        itemsize: bytes of one element.
        numel: elements of the buffer, gaps included.
        slots: by ``start``.
    """

    dtype: str
    itemsize: int
    numel: int
    slots: tuple[Slot, ...]

    @property
    def align(self) -> int:
        """Alignment in elements."""
        return max(1, ALIGN_BYTES // self.itemsize)

    @classmethod
    def lay_out(cls, dtype: str, itemsize: int, parameters: Iterable[tuple[str, str, int]]) -> Flat:
        """Places parameters one behind the other.

        Args:
            dtype: as torch names it.
            itemsize: bytes of one element.
            parameters: ``(name, layer, numel)`` in order of first use.
        """
        align = max(1, ALIGN_BYTES // itemsize)
        slots: list[Slot] = []
        start = 0
        for name, layer, numel in parameters:
            slots.append(Slot(name, layer, start, numel))
            start += -(-(numel + 1) // align) * align
        return cls(dtype, itemsize, start, tuple(slots))
