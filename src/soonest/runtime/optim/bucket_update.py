"""The user's own optimizer, one bucket at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from soonest.runtime.flat.param import FlatParam
from soonest.runtime.optim.shard import ParamShard

_SEPARABLE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.Adafactor,
    torch.optim.Rprop,
    torch.optim.ASGD,
    torch.optim.Muon,
)


_ELEMENTWISE = tuple(
    cls for cls in _SEPARABLE if cls not in (torch.optim.Adafactor, torch.optim.Muon)
)


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether each *element* is known to be updated by itself, so that it can be sharded."""
    return type(optimizer) in _ELEMENTWISE


def is_separable(optimizer: Optimizer) -> bool:
    """Whether each parameter's update is known to depend on nothing but itself.

    That is its value, gradient and state, and its group's settings. Only then can parameters be
    updated one bucket at a time. A class of the user's own might keep a count of steps or look at
    all gradients, so it is taken to be separable only if the user says so.
    """
    return type(optimizer) in _SEPARABLE


@dataclass(eq=False)
class StepCall:
    """The optimizer's settings and gradients as one call of ``optimizer.step()`` saw them.

    Args:
        groups: the settings of each parameter group, as they were, without its parameters.
        attributes: the optimizer's other attributes, as they were.
        gradients: by order of the parameter, what ``parameter.grad`` was, where it was not None;
            None if it is the one in the flat buffers, as the tensor may become the user's.

    Attributes:
        zeroed: parameters whose gradient was zeroed before they were updated.
    """

    groups: list[dict[str, Any]]
    attributes: dict[str, Any]
    gradients: dict[int, Tensor | None]
    zeroed: set[int] = field(default_factory=set[int])


class Updater:
    """Runs the user's optimizer on some of its parameters.

    It works on their aliases: second tensors over the same memory, which are never pending, so that
    the lane can update a parameter while the user's own tensor waits for that.

    Args:
        optimizer: the user's own.
        cls: its class as the user made it.
        params: the model's trainable parameters.

    Attributes:
        owned: the parameters among them that the optimizer has.
        seen_state: the state whose memory a lane has protected last.
    """

    def __init__(
        self, optimizer: Optimizer, cls: type[Optimizer], params: Sequence[FlatParam]
    ) -> None:
        self._optimizer = optimizer
        self._cls = cls
        self._step = raw_step(cls)
        self.seen_state: dict[Any, dict[str, Any]] | None = None
        self._params = params
        self.regroup()

    def __repr__(self) -> str:
        return f"Updater({self._cls.__name__}, {len(self.owned)} parameters)"

    def regroup(self) -> None:
        """Looks at the optimizer's parameter groups as they are now."""
        groups = self._optimizer.param_groups
        self._ids = _ids_of(groups)
        group_of = {id(p): g for g, group in enumerate(groups) for p in group["params"]}
        self.owned = [param for param in self._params if id(param.parameter) in group_of]
        self._group_of = {param.order: group_of[id(param.parameter)] for param in self.owned}
        known = {id(param.parameter) for param in self.owned}
        self._others = [p for group in groups for p in group["params"] if id(p) not in known]

    @property
    def param_ids(self) -> set[int]:
        """Ids of the parameters that the optimizer had when its groups were last looked at."""
        return {one for ids in self._ids for one in ids}

    def outdated(self) -> bool:
        """Whether the groups have changed since, in whatever way."""
        return self._ids != _ids_of(self._optimizer.param_groups)

    def trains_others(self) -> bool:
        """Whether the optimizer updates parameters that are not reduced here.

        It does if they have a gradient, as one that was frozen later and has kept its own.
        """
        return any(p.grad is not None for p in self._others)

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """The optimizer's own state as it is now, without waiting for updates under way."""
        return self._optimizer.__dict__["state"]

    def call(self, gradients: dict[int, Tensor | None]) -> StepCall:
        """Remembers the optimizer as it is now: schedulers change it right after the step.

        Args:
            gradients: see ``StepCall``.
        """
        attributes = dict(self._optimizer.__dict__)
        groups = [
            {name: _copied(value) for name, value in group.items() if name != "params"}
            for group in attributes.pop("param_groups")
        ]
        del attributes["state"]
        return StepCall(groups, attributes, gradients)

    def apply(self, call: StepCall, params: Sequence[FlatParam]) -> None:
        """Updates these parameters, as ``optimizer.step()`` would have done when it was called."""
        jobs: list[_Job] = []
        for param in params:
            gradient = call.gradients[param.order]
            if gradient is None:
                gradient = param.raw_grad
            jobs.append(_Job(param.alias, gradient, param.order, param.parameter))
        self._run(call, jobs, self.state)

    def apply_shards(
        self, call: StepCall, shards: Sequence[ParamShard], state: dict[Any, dict[str, Any]]
    ) -> None:
        """Updates these shards of parameters.

        Args:
            call: as for ``apply``.
            shards: of this rank.
            state: their states, by ``ParamShard.key``.
        """
        jobs: list[_Job] = []
        for shard in shards:
            shard.recall()
            param = shard.param
            gradient = call.gradients[param.order]
            own = shard.raw_grad if gradient is None else shard.part_of(gradient)
            jobs.append(_Job(shard.alias, own, param.order, shard.key))
        self._run(call, jobs, state)
        for shard in shards:
            shard.show()

    def _run(self, call: StepCall, jobs: Sequence[_Job], state: dict[Any, dict[str, Any]]) -> None:
        """Runs the user's ``step`` on an optimizer made for the purpose, of these jobs only."""
        partial: Any = object.__new__(self._cls)
        partial.__dict__.update(call.attributes)
        partial.state = defaultdict(dict)
        params: list[list[Any]] = [[] for _ in call.groups]
        for job in jobs:
            job.alias.grad = job.gradient
            params[self._group_of[job.order]].append(job.alias)
            known = state.get(job.key)
            if known is not None:
                partial.state[job.alias] = known
        partial.param_groups = [
            {**group, "params": chosen}
            for group, chosen in zip(call.groups, params, strict=True)
            if chosen
        ]
        self._step(partial)
        for job in jobs:
            job.alias.grad = None
            now = partial.state.get(job.alias)
            if now is not None:
                state[job.key] = now


def _ids_of(groups: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The ids of the parameters of each group."""
    return [[id(parameter) for parameter in group["params"]] for group in groups]


class _Job(NamedTuple):
    """One parameter or shard to update, with its gradient.

    Args:
        order: of the parameter.
        key: of its state.
    """

    alias: nn.Parameter
    gradient: Tensor
    order: int
    key: Any


def raw_step(cls: type[Optimizer]) -> Any:
    """A class's ``step`` without the wrapper that runs the user's step hooks."""
    step = cls.step
    return step.__wrapped__ if hasattr(step, "hooked") else step  # type: ignore[attr-defined]


def _copied(value: Any) -> Any:
    """A setting as it is now, even if the user changes it in place later."""
    if type(value) is tuple:  # betas
        return tuple(_copied(one) for one in value)
    return value.clone() if isinstance(value, Tensor) else value
