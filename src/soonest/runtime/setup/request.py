"""What a rank is asked for, and what it can judge of that by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from soonest import logs
from soonest.core.plan import Plan
from soonest.runtime.engine import consistency
from soonest.runtime.engine.engine import Engine
from soonest.runtime.execute.lane import Lane
from soonest.runtime.flat.buffers import trainable
from soonest.runtime.handle import is_shared
from soonest.runtime.optim.patch import optimizer_in
from soonest.runtime.options import Options
from soonest.runtime.tuning import plan_file
from soonest.runtime.validate import wrappers
from soonest.runtime.validate.checks import check, check_options

AfterStep = Callable[[Engine], None]


@dataclass(frozen=True, kw_only=True)
class TrainingPart:
    """Which part of a training this is, for those who also choose how it is done."""

    name: str = "the only one"
    """Which of the model's optimizers this is, in words that are the same on all ranks."""
    without: Collection[str] = ()
    """Names of parameters to leave alone."""
    ours: Callable[[nn.Parameter], bool] | None = None
    """Whether a parameter that comes to be trained later belongs to this part; None if all do."""
    equal: bool = False
    """All ranks' models are equal by now, and what they train stays the same."""
    lane: Lane | None = None
    """Executes the plan, which must be given, in a group of any size; None for the usual one."""
    turns: Callable[[AfterStep], AfterStep] | None = None
    """Given what learns from a step and compares ranks, says what to do at the end of each."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What this rank was asked for, and what is wrong with it here: the others have to be told."""

    model: nn.Module
    optimizer: Optimizer
    options: Options
    part: TrainingPart
    group: dist.ProcessGroup
    plan: Plan | None
    compare_every: int
    refused: ValueError | TypeError | None

    @property
    def asked(self) -> dict[str, object]:
        """What has to be the same on all ranks, by the name that an error gives it."""
        options = self.options
        return {
            "the optimizer": f"{type(self.optimizer).__name__} ({self.part.name})",
            "plan": "given" if self.plan else None,
            "separable": options.separable,
            "method": options.method,
            "shard_optimizer": options.shard_optimizer,
            "wire_dtype": options.wire_dtype,
            "parameter_wire_dtype": options.parameter_wire_dtype,
            "broadcast_buffers": options.broadcast_buffers,
            consistency.VARIABLE: self.compare_every,
        }


def check_request(
    model: nn.Module, optimizer: Optimizer, options: Options, part: TrainingPart
) -> Request:
    """Looks at everything that this rank can judge by itself.

    Raises:
        ValueError, TypeError: there is no group to tell.
    """
    refused: ValueError | TypeError | None = None
    try:
        optimizer = optimizer_in(optimizer)
    except TypeError as error:
        refused = error
    refused = refused or _refusal(model, optimizer, part.without, outside=not part.equal)
    if not (dist.is_available() and dist.is_initialized()):
        assert refused
        raise refused
    plan, every = None, 0
    try:
        check_options(options.method, options.wire, shard_optimizer=options.shard_optimizer)
        logs.follow_environment(dist.get_rank())
        every = consistency.interval()
        plan = plan_file.load(options.plan)
    except ValueError as error:
        refused = refused or error
    group = options.process_group if options.process_group is not None else dist.group.WORLD
    assert group is not None
    return Request(
        model=model,
        optimizer=optimizer,
        options=options,
        part=part,
        group=group,
        plan=plan,
        compare_every=every,
        refused=refused,
    )


def _refusal(
    model: nn.Module, optimizer: Optimizer, without: Collection[str], *, outside: bool
) -> ValueError | TypeError | None:
    """What is wrong with these two on this rank; the others have to be told.

    Args:
        model, optimizer: as given.
        without: names of parameters to leave alone.
        outside: look for what else may synchronize the model's gradients.
    """
    try:
        if isinstance(model, nn.Module) and is_shared(p for _, _, p in trainable(model, without)):
            raise ValueError(
                "this model is prioritized already: give prioritize all of its optimizers at once, "
                "as in prioritize(model, [first, second]), detach() the handle of the first call "
                "before, or call prioritize of the soonest.DistributedDataParallel that it is in"
            )
        check(model, optimizer, without)
        if outside:
            wrappers.check_outside(model)
    except (ValueError, TypeError) as error:
        return error
    return None
