"""What a plan may be chosen from, given the optimizer and what the user asks for."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from torch.optim import Optimizer

from soonest.core.cost import Network
from soonest.core.plan import Plan, shards
from soonest.runtime import comm
from soonest.runtime.optim import bucket_update, patch


class PlanSources(NamedTuple):
    """The methods and costs that a plan was chosen from, and why.

    Args:
        network: as calibrated.
        methods: that it may use.
        given: why there was nothing to choose, if so.
        notes: for the report.
    """

    network: Network
    methods: tuple[str, ...]
    given: str | None = None
    notes: tuple[str, ...] = ()


def methods_for(
    asked: str | None, given: Plan | None, ranks: comm.Ranks, *, sharded: bool
) -> tuple[str, ...]:
    """The methods that the plan may use, or does.

    Args:
        asked: the one that the user wants.
        given: the plan that the user gives.
        ranks: over which to reduce.
        sharded: the optimizer's state is sharded.

    Raises:
        ValueError: one is not there, or not on these ranks, or does not fit ``sharded``.
    """
    if given is not None:
        named = tuple(dict.fromkeys(bucket.method for bucket in given.buckets))
    elif asked is not None:
        named = (asked,)
    else:
        return tuple(method for method in ranks.methods if shards(method) == sharded)
    for method in named:
        comm.check_method(method, ranks)
        if shards(method) != sharded:
            raise ValueError(
                f"method {method!r} shards the optimizer's state: say shard_optimizer=True"
                if shards(method)
                else f"method {method!r} does not shard the optimizer's state: "
                "leave out shard_optimizer, or take method='shard'"
            )
    return named


def can_shard(optimizer: Optimizer, separable: bool | None) -> bool:
    """Whether the optimizer's state can be sharded, as the user wants; a warning says if not.

    Raises:
        ValueError: what ``separable`` says forbids it.
    """
    if separable is False:
        raise ValueError(
            "shard_optimizer=True updates parts of parameters, which separable=False forbids: "
            "leave out one of them"
        )
    if patch.hides_step(optimizer):
        raise ValueError(
            f"{replaced_step(optimizer)}, so ranks cannot update their own parts only: call "
            "soonest.prioritize before replacing it, or leave out shard_optimizer=True"
        )
    if bucket_update.is_elementwise(optimizer):
        return True
    warnings.warn(
        f"{type(optimizer).__name__} is not known to update each element by itself, so its state "
        "is not sharded: every rank keeps all of it",
        stacklevel=5,
    )
    return False


def replaced_step(optimizer: Optimizer) -> str:
    """Says what is wrong with a ``step`` that cannot be seen through; the sentence goes on."""
    return (
        f"optimizer.step of this {type(optimizer).__name__} was replaced by "
        f"{vars(optimizer)['step']!r}, which does not lead to the optimizer's own step"
    )


def warn_of_replaced_step(optimizer: Optimizer) -> None:
    """Warns of what is lost where ``step`` has been replaced by something unknown."""
    if patch.hides_step(optimizer):
        warnings.warn(
            f"{replaced_step(optimizer)}. It gets gradients that are reduced, and updates what it "
            "likes, but nothing of it overlaps the next forward pass: call soonest.prioritize "
            "before replacing it",
            stacklevel=5,
        )


def note_on(optimizer: Optimizer, shard_optimizer: bool, ranks: int) -> str:
    """Says for the report how the optimizer's state is sharded, or could be."""
    name = type(optimizer).__name__
    if not bucket_update.is_elementwise(optimizer):
        return f"{name} may look at whole parameters, so every rank updates all of them."
    if shard_optimizer:
        return f"Each rank keeps 1/{ranks} of the state of {name}."
    return f"shard_optimizer=True would leave each rank 1/{ranks} of the state of {name}."
