"""Finds tensors of the user's through which parameters or optimizer state are read unguarded.

They have to have their values when ``optimizer.step()`` returns, since nobody can make who reads
them wait.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soonest.runtime.flat.param import FlatParam
from soonest.runtime.flat.storage import references

_log = logging.getLogger(__name__)


class Aliases:
    """Finds parameters whose memory another tensor shares.

    That may be a view, ``.data``, or an entry of a ``state_dict()``, made earlier and kept.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def of(self, params: Iterable[FlatParam]) -> list[FlatParam]:
        """The parameters that another tensor shares memory with now; the log names each once."""
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

    They can only come from the optimizer. So once none was found, references are not counted again
    until the optimizer has been asked for its state. Tensors of a checkpoint that was loaded are
    not looked for: they stay in scope for long, and nobody reads them for what they become.

    Args:
        attributes: the optimizer's.
    """

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._attributes = attributes
        self._asked = self._told = False
        self._unkept = _UNKEPT
        self.loaded()

    def loaded(self) -> None:
        """Ignores the references that there are to a state just loaded: the checkpoint has them."""
        now = _counted(self._attributes)
        self._unkept = _UNKEPT._replace(
            value=max(now.value, _UNKEPT.value), memory=max(now.memory, _UNKEPT.memory)
        )

    def given(self) -> None:
        """Notes that the user has been given the optimizer's state, or has replaced it."""
        self._asked = True

    def are_kept(self, *, names: int) -> bool:
        """Whether the user keeps states or parts of them; the log says so once.

        Args:
            names: references to the mapping of all states that soonest itself holds.
        """
        if not self._asked:
            return False
        now = _counted(self._attributes)
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


class _Counts(NamedTuple):
    """Reference counts, the largest: of the mapping, a parameter's state, a tensor, its storage."""

    all: int
    one: int
    value: int
    memory: int


def _counted(attributes: Mapping[str, Any]) -> _Counts:
    one = value = memory = 0
    for values in attributes["state"].values():
        one = max(one, sys.getrefcount(values))
        for tensor in values.values() if isinstance(values, dict) else ():
            if isinstance(tensor, Tensor):
                value = max(value, sys.getrefcount(tensor))
                memory = max(memory, references(tensor.untyped_storage()._cdata))
    return _Counts(sys.getrefcount(attributes["state"]), one, value, memory)


_UNKEPT = _counted({"state": {0: {"step": torch.empty(1)}}})
"""The counts where nobody keeps any."""
