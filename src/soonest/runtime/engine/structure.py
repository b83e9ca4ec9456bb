"""What a model is made of, and whether that has changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import stateless


class Structure:
    """A model's modules and parameters as they were when it was last looked at.

    Args:
        model: whose; all that is in it counts, and is kept until the next look.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.look()

    def look(self) -> None:
        """Takes it as it is now."""
        self._parts, self._ids = _parts_of(self._model)

    def has_changed(self) -> bool:
        """Whether modules or parameters have been put in, replaced or taken out since.

        What stands in their places for one call only, as in ``torch.func.functional_call``, does
        not count.
        """
        parts, ids = _parts_of(self._model)
        return ids != self._ids and not (self._holds_tensors(parts) or _is_called_functionally())

    def _holds_tensors(self, parts: list[nn.Module | Tensor]) -> bool:
        """Whether tensors that have been computed stand where parameters were."""
        known = set(self._ids)
        return any(
            not isinstance(part, nn.Module | nn.Parameter) and id(part) not in known
            for part in parts
        )


def _is_called_functionally() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is stateless._functional_call.__code__:
            return True
        frame = frame.f_back
    return False


def _parts_of(model: nn.Module) -> tuple[list[nn.Module | Tensor], list[int]]:
    """All modules, each followed by its own parameters, and their ids; called in every step."""
    found: list[nn.Module | Tensor] = []
    for module in _modules(model):
        found.append(module)
        found += [p for p in module._parameters.values() if p is not None]
    return found, [id(part) for part in found]


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """As ``model.modules()``, in another order, in a third of the time."""
    seen: set[nn.Module] = {model}
    stack = [model]
    while stack:
        module = stack.pop()
        yield module
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
