"""Tensors beside those that a plan moves: what shares their memory, and what else is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn

from soonest.errors import SoonestError
from soonest.runtime.layout import Layout, Member
from soonest.runtime.update import Updater

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


def unshared(model: nn.Module, layout: Layout, updater: Updater) -> list[tuple[int, nn.Parameter]]:
    """What the optimizer holds that has a gradient of this rank alone, each with its group.

    Raises:
        SoonestError: nobody has asked for one of them to be left alone.
    """
    found = [(group, p) for group, p in updater.others if p.grad is not None]
    if found:
        names = {id(p): name for name, p in model.named_parameters()}
        for _, parameter in found:
            name = names.get(id(parameter))
            if name not in layout.without:
                what = f"parameter {name!r}" if name else "a parameter that is not the model's"
                raise SoonestError(
                    f"{what}, of shape {tuple(parameter.shape)}, has a gradient that is not "
                    "combined over the ranks, because it was not there, or required none, when "
                    "prioritize was called: detach() the handle and call prioritize again, on "
                    "every rank"
                )
    return found
