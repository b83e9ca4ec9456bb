"""Whether what two runs have left is the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def equal(one: Any, other: Any) -> bool:
    """In every bit, however tensors are nested."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        alike = type(one) is type(other) and len(one) == len(other)
        return alike and all(map(equal, one, other))
    return one == other
