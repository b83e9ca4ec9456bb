"""The entries of an optimizer's state for one parameter, some of which have a value per element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_OF_ALL_ELEMENTS = ("step", "eta", "mu", "mu_product")
"""What optimizers of ``torch.optim`` keep once for a parameter, as a tensor of no dimensions."""


def is_per_element(name: str, value: Any, shape: torch.Size) -> bool:
    """Whether an entry of a state has a value for each element of a parameter of this shape."""
    if not isinstance(value, Tensor) or value.shape != shape:
        return False
    return value.dim() > 0 or name not in _OF_ALL_ELEMENTS


def described(
    state: Mapping[str, Any], shape: torch.Size
) -> tuple[dict[str, torch.dtype], dict[str, Any]]:
    """The dtypes of the entries that have a value per element, and the other entries themselves."""
    parts = {key: value.dtype for key, value in state.items() if is_per_element(key, value, shape)}
    return parts, {key: value for key, value in state.items() if key not in parts}


def copy_of(value: Any) -> Any:
    """An entry with memory of its own, if it is a tensor."""
    return value.clone() if isinstance(value, Tensor) else value
