"""Ops that may still be in flight when the process ends.

gloo's own threads let go of an op's tensors when it ends. If nobody else has them then, they free
them and need the interpreter for it; where that is about to end they abort the process.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from soonest.runtime.comm.waiting import Work

_W = TypeVar("_W", bound="Work")
_MANY = 64
_works: dict[int, Work] = {}


def begun(work: _W) -> _W:
    """Keeps an op until ``over`` is called for it, and returns it."""
    if len(_works) > _MANY:  # after a failure nobody waits for those that were in flight
        for one in list(_works.values()):
            if one.is_completed():
                over(one)
    _works[id(work)] = work
    return work


def over(work: Work) -> None:
    """Lets go of an op that has ended."""
    _works.pop(id(work), None)


def never_free() -> None:
    """Keeps all ops in flight beyond the end of the interpreter."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dict(_works)))
