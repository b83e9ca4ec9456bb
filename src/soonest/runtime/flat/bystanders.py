"""Who may see parameters and the optimizer's state without asking for them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soonest.runtime.flat.buffers import FlatParam, references

_log = logging.getLogger(__name__)


class Aliases:
    """Finds parameters whose memory another tensor shares.

    That may be a view, ``.data``, or an entry of a ``state_dict()``, made earlier and kept. Nobody
    can make whoever reads it wait, so such a parameter has to be updated before ``step()`` returns.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def of(self, params: Iterable[FlatParam]) -> list[FlatParam]:
        """Those that have one now. The log tells of each once."""
        found = [param for param in params if param.is_aliased]
        for param in found:
            if param.name not in self._told:
                self._told.add(param.name)
                _log.info(
                    f"{param.name} is updated inside optimizer.step(), because another tensor "
                    "shares its memory: a view or .data of it, or an entry of a state_dict(), that "
                    "was kept"
                )
        return found


class States:
    """Finds out whether the user keeps states of an optimizer, and so may read them at any time.

    Whoever has any got it from the optimizer. So nobody is looked for until it has been asked
    again, once nobody was found. Who still has what was loaded is not looked for: checkpoints stay
    in scope for long, and nobody reads them for what they become.

    Args:
        attributes: the optimizer's.
    """

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._attributes = attributes
        self._asked = self._told = False
        self._unkept = _UNKEPT
        self.loaded()

    def loaded(self) -> None:
        """Tensors of a checkpoint are in use now, which may be there still."""
        now = _named(self._attributes)
        self._unkept = _UNKEPT._replace(
            value=max(now.value, _UNKEPT.value), memory=max(now.memory, _UNKEPT.memory)
        )

    def given(self) -> None:
        """The user has been given the optimizer's state, or has given it another."""
        self._asked = True

    def are_kept(self, *, names: int) -> bool:
        """Whether they are, or parts of them; the log tells so once.

        Args:
            names: so many of our own has the mapping of all states, beside the optimizer's.
        """
        if not self._asked:
            return False
        now = _named(self._attributes)
        self._asked = (
            now.all > self._unkept.all + names
            or now.one > self._unkept.one
            or now.value > self._unkept.value
            or now.memory > self._unkept.memory
        )
        if self._asked and not self._told:
            self._told = True
            _log.info(
                "parameters are updated inside optimizer.step(), because what the optimizer's "
                "state consists of was kept: optimizer.state, what is in it, or a state_dict()"
            )
        return self._asked


class _Names(NamedTuple):
    """How many there are, at most: of the mapping, a parameter's state, a tensor, its memory."""

    all: int
    one: int
    value: int
    memory: int


def _named(attributes: Mapping[str, Any]) -> _Names:
    one = value = memory = 0
    for values in attributes["state"].values():
        one = max(one, sys.getrefcount(values))
        for tensor in values.values() if isinstance(values, dict) else ():
            if isinstance(tensor, Tensor):
                value = max(value, sys.getrefcount(tensor))
                memory = max(memory, references(tensor.untyped_storage()._cdata))
    return _Names(sys.getrefcount(attributes["state"]), one, value, memory)


_UNKEPT = _named({"state": {0: {"step": torch.empty(1)}}})
"""As it is where nobody keeps any."""
