"""What ``DistributedDataParallel`` calls in the place of torch's C++ Reducer."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from soonest.core.plan import Plan
from soonest.runtime.ddp import logger
from soonest.runtime.ddp.comm_hook import Hook
from soonest.runtime.ddp.param_index import ParamIndex
from soonest.runtime.ddp.rebuild import Rebuild
from soonest.runtime.ddp.session import Session
from soonest.runtime.ddp.unused_parameters import UnusedParameterCheck
from soonest.runtime.device.clock import now_s
from soonest.runtime.engine.engine import Engine
from soonest.runtime.execute.pass_state import PassState
from soonest.runtime.flat.buffers import trainable
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.guard.hooks import weak_hook
from soonest.runtime.handle import Handle
from soonest.runtime.timing.step_record import NEVER


class Reducer:
    """Reduces the gradients of a module's parameters over the ranks, as settings say.

    The methods without docstrings are those that torch's class calls on its own.

    Args:
        module: whose parameters.
        group: over which.
        without: names of parameters that are not synchronized.
        find_unused: parameters may get no gradient in a backward pass.
        skip_unused: parameters that no rank uses at first are no longer synchronized.
        caps_bytes: bytes of gradients from which a bucket is closed, if the user says so.
        log: is told of plans, times and errors.
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        *,
        without: Collection[str],
        find_unused: bool,
        skip_unused: bool,
        caps_bytes: Sequence[int],
        log: logger.Log,
    ) -> None:
        self._module = module
        self._session = Session(module, group, without=without, caps_bytes=caps_bytes)
        self._index = ParamIndex(module, without)
        self._find_unused = find_unused
        self._skip_unused = skip_unused
        self._log = log
        self._passes = UnusedParameterCheck(self._index.of, log)
        self._rebuild = Rebuild()
        self._first_plan: str | None = None
        self._noted: Plan | None = None
        self._seen: PassState | None = None
        self._forwards = 0
        self._forward_began = NEVER
        self._synchronous = False
        self._removed = False
        self._leader: weakref.ref[Reducer] | None = None
        _reducers.add(self)

    def __repr__(self) -> str:
        return f"Reducer({self._led_by() or self._session!r})"

    @property
    def handle(self) -> Handle | None:
        """The handle of the engine that reduces; None before it was first needed."""
        leader = self._led_by()
        return leader.handle if leader else self._session.handle

    @property
    def engine(self) -> Engine | None:
        """What reduces now; None before, in a group of one rank, and after ``detach``."""
        return self._session.engine

    @property
    def has_given_way(self) -> bool:
        """Whether another one, made later, reduces the same gradients."""
        return self._led_by() is not None

    def _led_by(self) -> Reducer | None:
        """The one that reduces the same gradients instead, if there is one."""
        return self._leader() if self._leader is not None else None

    # Start and end

    def start(self) -> None:
        """Reduces gradients from now on; a collective call, unless it has started before."""
        if self._session.handle is not None or self._removed or self._led_by():
            return
        mine = {id(one) for _, _, one in trainable(self._module, self._session.without)}
        for other in [one for one in _reducers if one is not self and one.reduces_any(mine)]:
            other.give_way(self)
        self._rebuild.reset()
        counting = self._find_unused or self._passes.static
        self._passes.engine = self._session.start(counting=counting, turns=self._rebuild.put_off)
        if (engine := self._passes.engine) is not None:
            engine.after_backward = weak_hook(self._ended)
            self._first_plan = engine.bound_plan.plan.fingerprint
        self._note_plan()

    def stop(self) -> None:
        """Leaves gradients where they are made, and parameters plain."""
        self._session.stop()
        self._passes.engine = None

    def restart(self) -> None:
        """Starts anew with what has been set since; a collective call, if it had started."""
        if self._session.handle is not None:
            self.stop()
            self.start()

    def give_way(self, leader: Reducer) -> None:
        """Lets another one reduce the same gradients, as long as it lives."""
        self.stop()
        self._leader = weakref.ref(leader)

    def reduces_any(self, parameters: Collection[int]) -> bool:
        """Whether it reduces the gradients of any of these, given by their ids."""
        engine = self.engine
        return engine is not None and any(
            id(param.parameter) in parameters for param in engine.layout.params
        )

    def update_with(self, optimizer: Optimizer, options: Mapping[str, Any]) -> Handle:
        """Also updates, overlapped with the next forward pass; a collective call."""
        self.stop()
        undo = self._session.replace_optimizer(optimizer, options)
        try:
            self.start()
        except BaseException:
            undo()
            raise
        assert self._session.handle is not None
        return self._session.handle

    def call(self, state: Any, hook: Hook) -> None:
        """Lets a hook of the user's reduce; a collective call, if it has started before."""
        self._session.hook = (state, hook)
        self.restart()

    def send_as(self, dtype: torch.dtype) -> None:
        """Sends gradients in this dtype; a collective call, if it has started before."""
        self._session.wire = dtype
        self.restart()

    # The forward pass

    def prepare_for_forward(self) -> None:
        """A synchronizing forward pass begins."""
        if leader := self._led_by():
            leader.prepare_for_forward()
            return
        self._check_reducer_finalized()
        engine, times = self.engine, None
        if engine is not None and (latest := engine.backward.latest) is not None:
            times = logger.Times.of(self._forward_began, latest.record)
            unused = self._index.bytes_of(self._passes.missing)
            self._log.note(logger.of_order(latest, self._index.of))
            self._log.note(logger.of_use(unused, alike=self._passes.alike))
        self._log.forward_begins(times)
        self._forward_began = now_s()
        self._forwards += 1
        self._synchronous = self._rebuild.everyone = True
        if engine is not None:
            engine.gradients.divide_by(1 if self._session.hook else self._session.group.size())

    def _set_forward_pass_work_handle(self, work: Any, use_initial: bool) -> None:
        """Takes in how many ranks still have input, as a work counts them."""
        if leader := self._led_by():
            leader._set_forward_pass_work_handle(work, use_initial)
            return
        work.wait()
        active = round(float(work.result()[0].item()))
        self._rebuild.everyone = active == self._session.group.size()
        if self.engine is not None and not use_initial and not self._session.hook:
            self.engine.gradients.divide_by(active)

    def _rebuild_buckets(self) -> bool:
        """Starts, or learns from the step before: torch's class calls it between two steps."""
        if leader := self._led_by():
            return leader._rebuild_buckets()
        if not self._synchronous:
            return False
        self._synchronous = False
        self.start()
        engine = self.engine
        if engine is None or engine.backward.latest is self._seen:
            return False
        self._seen = engine.backward.latest
        if not self._session.updates:
            engine.step(None)
        if self._skip_unused:
            self._skip_unused = False
            if self._session.leave_out_unused(engine):
                self.restart()
                return True
        rebuilt = self._rebuild.run(engine)
        if engine.bound_plan.plan is not self._noted:
            self._note_plan()
        return rebuilt

    def prepare_for_backward(self, outputs: Sequence[Tensor]) -> None:
        """Lets the backward pass that follows this forward pass be reduced."""
        if leader := self._led_by():
            leader.prepare_for_backward(outputs)
            return
        self._passes.expect()

    def watch(self, outputs: Iterable[Tensor]) -> None:
        """Lets every backward pass through these outputs be reduced, also a second one."""
        leader = self._led_by() or self
        for output in outputs:
            if output.grad_fn is not None:
                output.register_hook(leader._passes.expect)

    def accumulate(self) -> None:
        """Lets the backward pass of the forward pass that begins only accumulate."""
        leader = self._led_by() or self
        if leader.engine is not None:
            leader.engine.backward.synchronizing = False

    # Uneven inputs

    def has_no_input(self) -> None:
        """Notes that other ranks begin a forward pass, and this one only takes part in reducing."""
        self._synchronous, self._rebuild.everyone = True, False

    def contribute_nothing(self) -> None:
        """Takes part in the backward pass of others with zeros."""
        if self.engine is not None:
            self.engine.contribute_nothing()

    # What else torch's class asks for

    def _check_reducer_finalized(self) -> None:
        self._passes.check(find_unused=self._find_unused, rank=self._session.group.rank())

    def _set_static_graph(self) -> None:
        self._passes.make_static(begun=bool(self._forwards))

    def _ddp_graph_static(self) -> bool:
        return self._passes.alike

    def _get_local_used_map(self) -> Tensor:
        """How many ranks had a gradient for each parameter, as registered."""
        self._index.update(self._session.without)
        if self.engine is not None:
            self.engine.flush()
        return self._index.counts(self.engine)

    def _remove_autograd_hooks(self) -> None:
        self.stop()
        self._removed = True

    def _reset_state(self) -> None:
        self._passes.missing, self._passes.changed = [], False
        self.stop()

    def _update_process_group(self, group: dist.ProcessGroup) -> None:
        self._session.group = group

    def _install_post_backward_futures(self, futures: Iterable[Any]) -> None:
        (self._led_by() or self)._passes.futures += list(futures)

    def _set_ddp_runtime_logging_sample_rate(self, rate: int) -> None:
        self._log.sample(rate)

    def _push_all_rebuilt_params(self) -> None: ...

    def _delay_all_reduce(self) -> None: ...

    def _ended(self, engine: Engine, late: Sequence[FlatParam]) -> None:
        if any(param.name not in self._index.of for param in late):
            self._index.update(self._session.without)
        self._passes.ended(engine, late)

    def _note_plan(self) -> None:
        self._index.update(self._session.without)
        if self.engine is not None:
            plan = self._noted = self.engine.bound_plan.plan
            rebuilt = plan.fingerprint != self._first_plan
            self._log.note(logger.of_plan(plan, self._index.of, rebuilt=rebuilt))


_reducers: weakref.WeakSet[Reducer] = weakref.WeakSet()
"""All that exist: two may be given the same parameters."""
