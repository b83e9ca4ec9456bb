"""What combines gradients in ``DistributedDataParallel``, in the place of torch's C++ Reducer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from soonest.errors import SoonestError
from soonest.runtime.comm import groups
from soonest.runtime.ddp import logger
from soonest.runtime.ddp.comm_hook import Hook, HookLane, whole_plan
from soonest.runtime.ddp.unused_parameters import UnusedParameterCheck
from soonest.runtime.device.clock import now_s
from soonest.runtime.engine.engine import Engine
from soonest.runtime.execute.pass_state import PassState
from soonest.runtime.flat.buffers import trainable
from soonest.runtime.flat.param import FlatParam
from soonest.runtime.handle import Handle
from soonest.runtime.options import Options
from soonest.runtime.setup import WINDOW, TrainingPart, build
from soonest.runtime.timing.step_record import NEVER


class NoOptimizer(Optimizer):
    """Updates nothing: a step then ends when gradients are combined."""

    def __init__(self) -> None:
        super().__init__([{"params": []}], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any: ...


class Reducer:
    """Combines the gradients of a module's parameters over the ranks, as settings say.

    The methods without docstrings are those that torch's class calls on its own.

    Args:
        module: whose parameters.
        group: over which.
        without: names of parameters that are not shared.
        find_unused: parameters may get no gradient in a backward pass.
        skip_unused: those that no rank uses at first are no longer shared.
        caps_bytes: bytes of gradients from which a bucket is closed, if the user says so.
        log: takes note of it all.
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
        self._group = group
        self._without = frozenset(without)
        self._index_of: dict[str, int] = {}
        self._sizes: list[int] = []
        self._note_names()
        self._find_unused = find_unused
        self._skip_unused = skip_unused
        self._caps_bytes = caps_bytes
        self._log = log
        self._passes = UnusedParameterCheck(self._index_of, log)
        self._hook: tuple[Any, Hook] | None = None
        self._wire: torch.dtype | None = None
        self._optimizer: Optimizer = NoOptimizer()
        self._options: dict[str, Any] = {}
        self._learn: Callable[[Engine], None] | None = None
        self._first_plan: str | None = None
        self._seen: PassState | None = None
        self._forwards = 0
        self._forward_began = NEVER
        self._synchronous = False
        self._everyone = True
        self._removed = False
        self._leader: weakref.ref[Reducer] | None = None
        self._kept = _Kept()
        weakref.finalize(self, self._kept.let_go).atexit = False
        _reducers.add(self)

    @property
    def handle(self) -> Handle | None:
        """Of the engine that combines; None before it was first needed."""
        leader = self._led_by()
        return leader.handle if leader else self._kept.handle

    @property
    def engine(self) -> Engine | None:
        """What combines now; None before, in a group of one rank, and after ``detach``."""
        return self._kept.handle.engine if self._kept.handle is not None else None

    @property
    def has_given_way(self) -> bool:
        """Whether another one, made later, combines the same gradients."""
        return self._led_by() is not None

    def _led_by(self) -> Reducer | None:
        return self._leader() if self._leader is not None else None

    # Start and end

    def start(self) -> None:
        """From now on gradients are combined; a collective call."""
        if self._kept.handle is not None or self._removed or self._led_by():
            return
        mine = {id(parameter) for _, _, parameter in trainable(self._module, self._without)}
        for other in list(_reducers):
            if other is not self and other.shares(mine):
                other.give_way(self)
        lane = None
        if self._hook is not None:
            state, hook = self._hook
            lane = HookLane(hook, state, counting=self._find_unused or self._passes.static)
        fixed = lane is not None or bool(self._caps_bytes)
        options = {"separable": False if lane else None, **self._options}
        if isinstance(self._optimizer, NoOptimizer):
            options["separable"] = False
        if fixed:
            options["plan"] = whole_plan(
                trainable(self._module, self._without),
                ranks=self._group.size(),
                caps_bytes=self._caps_bytes,
                window=None if lane else WINDOW,
            )
        self._kept.handle = build(
            self._module,
            self._optimizer,
            Options(
                **{"wire_dtype": self._wire, "broadcast_buffers": False, **options},
                process_group=self._group,
                timeout_s=groups.timeout_of(self._group),
            ),
            TrainingPart(without=self._without, equal=True, lane=lane, turns=self._take_turns),
        )
        engine = self._passes.engine = self._kept.handle.engine
        self._passes.due = False
        if engine is not None:
            engine.backward.synchronizing = False
            engine.after_backward = self._ended
            if lane is not None:
                engine.gradients.divide_by(1)
            self._first_plan = engine.bound_plan.plan.fingerprint
        self._note_plan()

    def stop(self) -> None:
        """Gradients stay where they are made; the parameters are plain ones again."""
        self._kept.let_go()
        self._passes.engine = None

    def restart(self) -> None:
        """With what has been set meanwhile; a collective call, if it has started before."""
        if self._kept.handle is not None:
            self.stop()
            self.start()

    def give_way(self, leader: Reducer) -> None:
        """Lets another one combine the same gradients, as long as it lives."""
        self.stop()
        self._leader = weakref.ref(leader)

    def shares(self, parameters: Collection[int]) -> bool:
        """Whether it combines the gradients of any of these, given by their ids."""
        engine = self.engine
        return engine is not None and any(
            id(param.parameter) in parameters for param in engine.layout.params
        )

    def update_with(self, optimizer: Optimizer, options: Mapping[str, Any]) -> Handle:
        """Also updates, overlapped with the next forward pass; a collective call."""
        self.stop()
        before = self._optimizer, self._options
        self._optimizer, self._options = optimizer, dict(options)
        try:
            self.start()
        except BaseException:
            self._optimizer, self._options = before
            raise
        assert self._kept.handle is not None
        return self._kept.handle

    def call(self, state: Any, hook: Hook) -> None:
        """Lets a hook of the user's combine; a collective call, if it has started before."""
        self._hook = (state, hook)
        self.restart()

    def send_as(self, dtype: torch.dtype) -> None:
        """Sends gradients so; a collective call, if it has started before."""
        self._wire = dtype
        self.restart()

    def _take_turns(self, learn: Callable[[Engine], None]) -> Callable[[Engine], None]:
        self._learn = learn
        return self._passes.stepped

    # The forward pass

    def prepare_for_forward(self) -> None:
        """A synchronizing forward pass begins."""
        if leader := self._led_by():
            leader.prepare_for_forward()
            return
        self._check_reducer_finalized()
        engine = self.engine
        times = None
        if engine is not None and (latest := engine.backward.latest) is not None:
            times = logger.Times.of(self._forward_began, latest.record)
            self._note_order(latest)
            self._note_use()
        self._log.forward_begins(times)
        self._forward_began = now_s()
        self._forwards += 1
        self._synchronous, self._everyone = True, True
        if engine is not None:
            engine.gradients.divide_by(1 if self._hook else self._group.size())

    def _set_forward_pass_work_handle(self, work: Any, use_initial: bool) -> None:
        """Some ranks may have no more input; the work counts those that have."""
        if leader := self._led_by():
            leader._set_forward_pass_work_handle(work, use_initial)
            return
        work.wait()
        active = round(float(work.result()[0].item()))
        self._everyone = active == self._group.size()
        if self.engine is not None and not use_initial and not self._hook:
            self.engine.gradients.divide_by(active)

    def _rebuild_buckets(self) -> bool:
        """Between two steps: the place to start, and to learn from the one before."""
        if leader := self._led_by():
            return leader._rebuild_buckets()
        if not self._synchronous:
            return False
        self._synchronous = False
        self.start()
        engine, passes = self.engine, self._passes
        if engine is None or engine.backward.latest is self._seen:
            return False
        self._seen = engine.backward.latest
        if isinstance(self._optimizer, NoOptimizer):
            engine.step(None)
        if self._skip_unused and self._drop_unused(engine):
            return True
        if not (passes.due and self._everyone and self._learn):
            return False
        passes.due = False
        latest = engine.backward.latest
        if latest is None or engine.profiler.record is not latest.record:  # it was stepped twice
            return False
        before = engine.bound_plan.plan.fingerprint
        self._learn(engine)
        self._note_plan()
        return engine.bound_plan.plan.fingerprint != before

    def prepare_for_backward(self, outputs: Sequence[Tensor]) -> None:
        """The forward pass has ended; the backward pass that follows is to be combined."""
        if leader := self._led_by():
            leader.prepare_for_backward(outputs)
            return
        self._passes.expect()

    def watch(self, outputs: Iterable[Tensor]) -> None:
        """Combines every backward pass that leads through these, also a second one."""
        leader = self._led_by() or self
        for output in outputs:
            if output.grad_fn is not None:
                output.register_hook(leader._passes.expect)

    def accumulate(self) -> None:
        """A forward pass begins whose backward pass is not to be combined."""
        leader = self._led_by() or self
        if leader.engine is not None:
            leader.engine.backward.synchronizing = False

    # Uneven inputs

    def has_no_input(self) -> None:
        """Other ranks begin a forward pass, and this one only takes part in what they combine."""
        self._synchronous, self._everyone = True, False

    def contribute_nothing(self) -> None:
        """Takes part in the backward pass of others."""
        if self.engine is not None:
            self.engine.contribute_nothing()

    # What else torch's class asks for

    def _check_reducer_finalized(self) -> None:
        self._passes.check(find_unused=self._find_unused, rank=self._group.rank())

    def _set_static_graph(self) -> None:
        if self._forwards:
            error = (
                "set_static_graph() should be called before training loop starts and after "
                "DistributedDataParallel is constructed"
            )
            self._log.set_error_and_log(error)
            raise RuntimeError(error)
        self._passes.static = True

    def _ddp_graph_static(self) -> bool:
        return self._passes.alike

    def _get_local_used_map(self) -> Tensor:
        """How many ranks had a gradient for each parameter, as registered."""
        self._note_names()
        counts = torch.zeros(len(self._index_of), dtype=torch.int32)
        if self.engine is not None:
            self.engine.flush()
            for param in self.engine.layout.params:
                counts[self._index_of[param.name]] = self.engine.bound_plan.users_of(param)
        return counts

    def _remove_autograd_hooks(self) -> None:
        self.stop()
        self._removed = True

    def _reset_state(self) -> None:
        self._passes.missing, self._passes.changed = [], False
        self.stop()

    def _update_process_group(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def _install_post_backward_futures(self, futures: Iterable[Any]) -> None:
        (self._led_by() or self)._passes.futures += list(futures)

    def _set_ddp_runtime_logging_sample_rate(self, rate: int) -> None:
        self._log.sample(rate)

    def _push_all_rebuilt_params(self) -> None: ...

    def _delay_all_reduce(self) -> None: ...

    def _drop_unused(self, engine: Engine) -> bool:
        """No longer shares what no rank has used."""
        self._skip_unused = False
        engine.flush()
        params = engine.layout.params
        unused = [m.name for m in params if not engine.bound_plan.users_of(m)]
        if not unused:
            return False
        self._without |= set(unused)
        self.restart()
        return True

    def _note_names(self) -> None:
        """Parameters that have come to be trained get places behind those before them."""
        for name, _, parameter in trainable(self._module, self._without):
            if name not in self._index_of:
                self._index_of[name] = len(self._sizes)
                self._sizes.append(parameter.nbytes)

    def _ended(self, engine: Engine, late: Sequence[FlatParam]) -> None:
        if any(param.name not in self._index_of for param in late):
            self._note_names()
        self._passes.ended(engine, late)

    def _note_plan(self) -> None:
        self._note_names()
        if self.engine is not None:
            plan = self.engine.bound_plan.plan
            rebuilt = plan.fingerprint != self._first_plan
            self._log.note(logger.of_plan(plan, self._index_of, rebuilt=rebuilt))

    def _note_use(self) -> None:
        unused = sum(self._sizes[index] for index in self._passes.missing)
        self._log.note(
            {"unused_parameter_size": unused, "can_set_static_graph": self._passes.alike}
        )

    def _note_order(self, pass_state: PassState) -> None:
        ready = pass_state.record.ready
        order = sorted(pass_state.bound_plan.layout.params, key=lambda param: ready[param.order])
        indices = ", ".join(str(self._index_of[param.name]) for param in order)
        self._log.note({"prev_iteration_grad_ready_order_indices": indices})


_reducers: weakref.WeakSet[Reducer] = weakref.WeakSet()


class _Kept:
    """The handle of a reducer, which outlives it for a moment."""

    handle: Handle | None = None

    def let_go(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            with suppress(SoonestError):  # another rank is lost, as whoever trains on will notice
                handle.detach()
