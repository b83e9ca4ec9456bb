"""The local search that improves orders: it takes the first change that helps, again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

_Op = TypeVar("_Op")


def descend(
    order: list[_Op],
    cost: float,
    neighbourhoods: Sequence[Callable[[list[_Op]], Iterable[list[_Op]]]],
    *,
    timed: Callable[[list[_Op], float], float],
    gain: float,
    is_good: Callable[[float, list[_Op]], bool] = lambda _cost, _order: False,
    is_spent: Callable[[], bool],
) -> tuple[float, list[_Op]]:
    """Goes downhill until no change helps, the order is good or the work is spent.

    Changes of one kind follow each other while they help; then those of the next kind are tried.

    Args:
        order: to begin with.
        cost: of it.
        neighbourhoods: each yields orders that differ from one by a change of its kind, those that
            are most likely to help first.
        timed: the cost of an order; above the limit given any such cost.
        gain: a change must lower the cost by this fraction to be made.
        is_good: whether nothing better than a cost and its order is needed.
        is_spent: whether to give up; asked after each change in vain.

    Returns:
        The cost of the last order, and that order.
    """
    kinds, vain = tuple(neighbourhoods), 0
    while vain < len(kinds) and not is_good(cost, order):
        limit = cost * (1 - gain)
        for candidate in kinds[0](order):
            tried = timed(candidate, limit)
            if tried < limit:
                order, cost, vain = candidate, tried, 0
                break
            if is_spent():
                return cost, order
        else:
            kinds, vain = (*kinds[1:], kinds[0]), vain + 1
    return cost, order
