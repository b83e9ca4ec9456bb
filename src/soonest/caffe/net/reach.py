"""What a loss depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def unreached(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of some tensors that would get no gradient from a loss."""
    reached: set[int] = set()
    seen: set[Any] = set()
    coming = [loss.grad_fn]
    while coming:
        node = coming.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            coming += [before for before, _ in node.next_functions]
    return [tensor for tensor in tensors if id(tensor) not in reached]
