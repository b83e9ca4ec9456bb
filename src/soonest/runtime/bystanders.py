"""Tensors that share the memory of parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from soonest.runtime.layout import Member

_log = logging.getLogger("soonest")


class Aliases:
    """Finds parameters whose memory another tensor shares.

    That may be a view, ``.data``, or an entry of a ``state_dict()``, made earlier and kept. Nobody
    can make whoever reads it wait, so such a parameter has to be updated before ``step()`` returns.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def of(self, members: Iterable[Member]) -> list[Member]:
        """Those that have one now. The log tells of each once."""
        found = [member for member in members if member.is_aliased]
        for member in found:
            if member.name not in self._told:
                self._told.add(member.name)
                _log.info(
                    f"{member.name} is updated inside optimizer.step(), because another tensor "
                    "shares its memory: a view or .data of it, or an entry of a state_dict(), that "
                    "was kept"
                )
        return found
