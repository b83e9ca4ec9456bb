"""What the ranks make sure of together before anything depends on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import zip_longest

from torch import nn

from soonest.core.plan import Plan
from soonest.errors import PlanMismatchError
from soonest.runtime import collectives
from soonest.runtime.layout import trainable
from soonest.runtime.peers import said


def agree_on_input(group: collectives.Group, refused: Exception | None) -> None:
    """Makes sure that every rank can work with what it was given; a collective call.

    Args:
        group: all ranks.
        refused: what this rank cannot work with; None if it can.

    Raises:
        ValueError: on every rank, with the words of the first that cannot; on that one, and others
            that cannot, what it refused.
    """
    elsewhere = first_refusal(group, refused)
    if refused:
        raise refused
    if elsewhere:
        raise ValueError(elsewhere)


def first_refusal(group: collectives.Group, refused: Exception | None) -> str | None:
    """What the first rank cannot work with that cannot, in words; a collective call."""
    every = collectives.gather_objects(group, said(refused) if refused else None)
    return next((f"rank {rank}: {one}" for rank, one in enumerate(every) if one is not None), None)


def agree_on_model(
    group: collectives.Group, model: nn.Module, without: Collection[str] = ()
) -> None:
    """Compares the trainable parameters of all ranks' models; a collective call.

    Args:
        group: all ranks.
        model: this rank's.
        without: names of parameters that may differ.

    Raises:
        PlanMismatchError: on every rank, naming the first parameter that differs.
    """
    mine = [f"{name} {tuple(p.shape)} {p.dtype}" for name, _, p in trainable(model, without)]
    models = collectives.gather_objects(group, mine)
    for rank, theirs in enumerate(models):
        for index, (first, other) in enumerate(zip_longest(models[0], theirs, fillvalue="missing")):
            if first != other:
                raise PlanMismatchError(
                    f"the ranks have different models: parameter {index} is {first} on rank 0 and "
                    f"{other} on rank {rank}. Every rank must build the same model"
                )


def agree_on_options(group: collectives.Group, options: Mapping[str, object]) -> None:
    """Compares what the ranks asked for; a collective call.

    Raises:
        PlanMismatchError: on every rank, naming the first option that differs.
    """
    mine = {name: str(value) for name, value in options.items()}
    every = collectives.gather_objects(group, mine)
    for rank, theirs in enumerate(every):
        for name, value in every[0].items():
            if theirs[name] != value:
                raise PlanMismatchError(
                    f"the ranks ask for different things: {name} is {value} on rank 0 and "
                    f"{theirs[name]} on rank {rank}. Every rank must call prioritize alike"
                )


def agree_on_plan(group: collectives.Group, plan: Plan) -> None:
    """Compares the plans of all ranks; a collective call.

    Raises:
        PlanMismatchError: on every rank, naming the first difference.
    """
    fingerprints = collectives.gather_objects(group, plan.fingerprint)
    if len(set(fingerprints)) == 1:
        return
    plans = [Plan.from_json(p) for p in collectives.gather_objects(group, plan.to_json())]
    rank, other = next((r, p) for r, p in enumerate(plans) if p.fingerprint != fingerprints[0])
    raise PlanMismatchError(
        f"the ranks have different plans; first difference between rank 0 and rank {rank}: "
        f"{plans[0].difference(other)}. Give every rank the same plan"
    )
