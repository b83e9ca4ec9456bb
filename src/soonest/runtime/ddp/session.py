"""What reduces the gradients of a ``DistributedDataParallel``, with settings that may change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from soonest.errors import SoonestError
from soonest.runtime.comm import groups
from soonest.runtime.ddp.buckets import whole_plan
from soonest.runtime.ddp.comm_hook import Hook, HookLane
from soonest.runtime.engine.engine import Engine
from soonest.runtime.flat.buffers import trainable
from soonest.runtime.handle import Handle
from soonest.runtime.options import Options
from soonest.runtime.setup import WINDOW, AfterStep, TrainingPart, build

Turns = Callable[[AfterStep], AfterStep]
"""Given what to do after a step, says what to do then instead."""


class NoOptimizer(Optimizer):
    """Updates nothing: a step then ends when gradients are reduced."""

    def __init__(self) -> None:
        super().__init__([{"params": []}], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any: ...


class Session:
    """An engine that can be stopped, and started anew with other settings.

    Args:
        module: whose gradients are reduced.
        group: over which ranks.
        without: names of parameters that are left alone.
        caps_bytes: bytes of gradients from which a bucket is closed, if the user says so.

    Attributes:
        without: the same, read at each start.
        hook: the state and the function of the user's that reduces gradients, if one does.
        wire: the dtype in which gradients are sent; their own if None.
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        *,
        without: Collection[str],
        caps_bytes: Sequence[int],
    ) -> None:
        self._module = module
        self.group = group
        self.without = frozenset(without)
        self._caps_bytes = caps_bytes
        self.hook: tuple[Any, Hook] | None = None
        self.wire: torch.dtype | None = None
        self._optimizer: Optimizer = NoOptimizer()
        self._options: dict[str, Any] = {}
        self._kept = _Kept()
        weakref.finalize(self, self._kept.let_go).atexit = False

    def __repr__(self) -> str:
        state = "on" if self.handle is not None else "off"
        return f"Session({type(self._module).__name__}, {state}, {self.group.size()} ranks)"

    @property
    def handle(self) -> Handle | None:
        """The engine's handle; None before the first start and after ``stop``."""
        return self._kept.handle

    @property
    def engine(self) -> Engine | None:
        """What reduces now; None while stopped, in a group of one rank, and after ``detach``."""
        return self._kept.handle.engine if self._kept.handle is not None else None

    @property
    def updates(self) -> bool:
        """Whether it also runs an optimizer of the user's."""
        return not isinstance(self._optimizer, NoOptimizer)

    def start(self, *, counting: bool, turns: Turns) -> Engine | None:
        """Reduces gradients from now on; a collective call.

        Args:
            counting: see ``HookLane``.
            turns: see there.
        """
        lane = None
        if self.hook is not None:
            state, hook = self.hook
            lane = HookLane(hook, state, counting=counting)
        options = {"separable": False if lane else None, **self._options}
        if not self.updates:
            options["separable"] = False
        if lane is not None or self._caps_bytes:
            options["plan"] = whole_plan(
                trainable(self._module, self.without),
                ranks=self.group.size(),
                caps_bytes=self._caps_bytes,
                window=None if lane else WINDOW,
            )
        self._kept.handle = build(
            self._module,
            self._optimizer,
            Options(
                **{"wire_dtype": self.wire, "broadcast_buffers": False, **options},
                process_group=self.group,
                timeout_s=groups.timeout_of(self.group),
            ),
            TrainingPart(without=self.without, equal=True, lane=lane, turns=turns),
        )
        engine = self.engine
        if engine is not None:
            engine.backward.synchronizing = False
            if lane is not None:  # the hook divides
                engine.gradients.divide_by(1)
        return engine

    def stop(self) -> None:
        """Leaves gradients where they are made, and parameters plain."""
        self._kept.let_go()

    def leave_out_unused(self, engine: Engine) -> bool:
        """Lets the next start leave out what no rank has used; returns whether there is any."""
        engine.flush()
        unused = {m.name for m in engine.layout.params if not engine.bound_plan.usage.users_of(m)}
        self.without |= unused
        return bool(unused)

    def replace_optimizer(
        self, optimizer: Optimizer, options: Mapping[str, Any]
    ) -> Callable[[], None]:
        """Lets the next start run an optimizer of the user's; returns what undoes that.

        Args:
            optimizer: of this model.
            options: as for ``soonest.prioritize``.
        """
        before = self._optimizer, self._options

        def undo() -> None:
            self._optimizer, self._options = before

        self._optimizer, self._options = optimizer, dict(options)
        return undo


class _Kept:
    """The handle of a session, which outlives it for a moment."""

    handle: Handle | None = None

    def let_go(self) -> None:
        """Detaches the handle, if there is one."""
        handle, self.handle = self.handle, None
        if handle is not None:
            with suppress(SoonestError):  # another rank is lost, as whoever trains on will notice
                handle.detach()
