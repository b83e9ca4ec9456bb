"""A ``DistributedDataParallel`` that is a subclass of torch's, for all that expects that one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]
from torch.nn.parallel import distributed as theirs
from torch.optim import Optimizer

from soonest.errors import SoonestError
from soonest.runtime import agreement
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.ddp import arguments
from soonest.runtime.ddp.comm_hook import Hook
from soonest.runtime.ddp.logger import Log
from soonest.runtime.ddp.reducer import Reducer
from soonest.runtime.handle import Handle
from soonest.runtime.validate import wrappers

_NAME = "DistributedDataParallel()"
_Theirs = theirs.DistributedDataParallel


class DistributedDataParallel(_Theirs):
    """torch's ``DistributedDataParallel``, with gradients reduced by soonest.

    It takes the same arguments, has the same methods and keys of ``state_dict()``, and gives the
    same results. Gradients are reduced while the backward pass goes on, and whoever reads one
    first waits for that one. ``prioritize(optimizer)`` adds the next forward pass.

    Args:
        module: as for torch's class, and all others too. What differs:

            - ``bucket_cap_mb``, ``bucket_cap_mb_list``: buckets are then those of torch's class;
              without them, soonest chooses and measures.
            - ``gradient_as_bucket_view``: gradients are views of flat buffers in any case, but may
              be detached in place.
            - ``batched_grad_copy``: gradients are copied in any case only where autograd has made
              them elsewhere.
            - ``mixed_precision``: refused; use ``torch.autocast``.

    Raises:
        ValueError: an argument cannot be honoured; the message says what to do.
    """

    _failures: FailureReporter | None = None
    reducer: Reducer
    """Missing where ``delay_all_reduce_named_params`` names all parameters."""

    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = arguments.given(module, *args, **kwargs)
        refused = arguments.refusal(given)
        group = arguments.group_of(given) if given.get("init_sync", True) else None
        if group is not None and isinstance(module, nn.Module):
            self._failures = failures = FailureReporter(group, _NAME)
            with failures.together(_NAME):
                agreement.agree_on_input(group, refused)
                ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
                agreement.agree_on_model(group, module, ignored)
                agreement.agree_on_the_rest(group, module, ignored)
                failures.learn_connections()
        if refused:
            raise refused
        self._skip_unused = bool(given.get("skip_all_reduce_unused_params"))
        chosen = given.get("bucket_cap_mb") is not None or given.get("bucket_cap_mb_list")
        self._caps_are_given = bool(chosen)
        try:
            super().__init__(module, *args, **kwargs)
        except Exception as error:
            if (lost := self._lost(error)) is not None:
                raise lost from error
            raise
        if self._use_python_reducer:
            raise ValueError(
                "torch._dynamo.config.optimize_ddp is 'python_reducer', which would reduce "
                "gradients as well: set it to True or False"
            )
        if given.get("init_sync", True) and hasattr(self, "reducer"):
            with self._failures.together(_NAME) if self._failures else nullcontext():
                self.reducer.start()

    def _lost(self, error: Exception) -> SoonestError | None:
        """The error to raise where other ranks are at fault for what torch's class has raised."""
        if self._failures is None:
            return None
        if isinstance(error, RuntimeError) and _is_from_collective(error):
            return self._failures.failed(_NAME, "could not be done on all ranks", error)
        self._failures.at_fault(error)
        return None

    def __getstate__(self) -> Any:
        state: Any = super().__getstate__()
        state.pop("_failures", None)  # of this process
        return state

    def _sync_buffers(self) -> None:
        if self._failures is None:
            super()._sync_buffers()
            return
        engine = self.reducer.engine if hasattr(self, "reducer") else None
        # An engine's lane answers for this rank, to its own.
        failures = engine.failures if engine is not None else self._failures
        step = engine.backward.passes if engine is not None else 0
        with failures.together(f"step {step}: sending the first rank's buffers"):
            super()._sync_buffers()

    @property
    def handle(self) -> Handle | None:
        """Plan, report, timeline and history; None before the first pass if nothing was synced."""
        return self.reducer.handle if hasattr(self, "reducer") else None

    @property
    def has_given_way(self) -> bool:
        """Whether another ``DistributedDataParallel``, made later, reduces the same gradients."""
        return hasattr(self, "reducer") and self.reducer.has_given_way

    def prioritize(self, optimizer: Optimizer, **options: Any) -> Handle:
        """Overlaps reducing gradients with the next forward pass, too; every rank must call it.

        Args:
            optimizer: of this model.
            options: as for ``soonest.prioritize``, without ``process_group`` and ``timeout_s``,
                and without ``plan`` where ``bucket_cap_mb`` says what it is.

        Returns:
            A handle; it need not be kept.

        Raises:
            ValueError: the optimizer or an option is not fit for this; the message says what to do.
        """
        fixed = self._caps_are_given or self._comm_hooks
        unfit = {"process_group", "timeout_s", *(["plan", "method"] if fixed else [])} & set(
            options
        )
        if unfit:
            raise ValueError(
                f"{min(unfit)} was given to prioritize, but DistributedDataParallel has settled "
                "that already: give it there"
            )
        if not hasattr(self, "reducer"):
            raise ValueError(
                "prioritize was called, but delay_all_reduce_named_params leaves no parameter to "
                "it: name fewer there"
            )
        return self.reducer.update_with(optimizer, options)

    # What torch's class builds its own Reducer and Logger for

    def _ddp_init_helper(
        self,
        parameters: Sequence[nn.Parameter],
        expect_sparse_gradient: Sequence[bool],
        param_to_name_mapping: dict[int, str],
        static_graph: bool,
    ) -> None:
        modules = list(self.module.modules())
        group: Any = self.process_group
        self.logger: Any = Log(
            parameters,
            group,
            {
                "module_name": type(self.module).__name__,
                "device_ids": ", ".join(str(device) for device in self.device_ids or ()),
                "output_device": -1 if self.output_device is None else self.output_device,
                "broadcast_buffers": self.forward_sync_buffers,
                "bucket_cap_bytes": self.bucket_bytes_cap,
                "find_unused_parameters": self.find_unused_parameters,
                "gradient_as_bucket_view": self.gradient_as_bucket_view,
                "is_multi_device_module": self.is_multi_device_module,
                "static_graph": static_graph,
                "has_sync_bn": any(isinstance(m, nn.SyncBatchNorm) for m in modules),
            },
        )
        caps = self.bucket_bytes_cap_list or [self.bucket_bytes_cap]
        self.reducer = Reducer(
            self.module,
            group,
            without=self.parameters_to_ignore,
            find_unused=self.find_unused_parameters,
            skip_unused=self._skip_unused,
            caps_bytes=caps if self._caps_are_given else (),
            log=self.logger,
        )
        self._passing_sync_batchnorm_handle(self.module)

    def _pre_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            wrappers.check_caller()
        accumulates = torch.is_grad_enabled() and not self.require_backward_grad_sync
        if accumulates and hasattr(self, "reducer"):
            self.reducer.accumulate()
        return super()._pre_forward(*inputs, **kwargs)

    def _post_forward(self, output: Any) -> Any:
        output = super()._post_forward(output)
        synchronizes = torch.is_grad_enabled() and self.require_backward_grad_sync
        if synchronizes and hasattr(self, "reducer"):
            self.reducer.watch(t for t in theirs._find_tensors(output) if isinstance(t, Tensor))
        return output

    def _delayed_all_reduce_hook(self, grad: Tensor) -> Tensor:
        """Averages the delayed gradients as torch's does, but waits before the pass ends."""
        assert self._delay_grad_buffer is not None
        self._delay_grad_buffer.div_(dist.get_world_size(self.process_group))
        work = dist.all_reduce(self._delay_grad_buffer, group=self.process_group, async_op=True)
        assert work is not None
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(work.wait)
        return grad

    def _setup_in_backward_optimizers(self) -> None:
        if any(hasattr(p, "_in_backward_optimizers") for p in self._module_parameters):
            raise ValueError(
                "optimizers were put into the backward pass (_apply_optimizer_in_backward), where "
                "gradients are not reduced yet: use an ordinary optimizer, and "
                "ddp.prioritize(optimizer), which updates each parameter as soon as it can be"
            )

    def register_comm_hook(self, state: object, hook: Hook) -> None:
        """Lets a hook of the user's reduce gradients, bucket by bucket in soonest's order.

        As for torch's class. Every rank must call it.
        """
        self._check_comm_hook(hook)
        if self._comm_hooks:
            self._log_and_throw(
                RuntimeError, "register_comm_hook can only be called once: combine the hooks"
            )
        self.logger._set_comm_hook_name(hook.__qualname__)
        self._comm_hooks.append((hook, state))
        self.reducer.call(state, hook)

    def _register_builtin_comm_hook(self, comm_hook_type: Any) -> None:
        self.logger._set_comm_hook_name(str(comm_hook_type))
        if comm_hook_type == _distributed_c10d.BuiltinCommHookType.FP16_COMPRESS:
            self.reducer.send_as(torch.float16)

    # Uneven inputs

    def join_hook(self, **kwargs: Any) -> _JoinHook:
        """Makes the hook by which a rank without input joins in others' steps; see ``join``."""
        handle = self.handle
        if handle is not None and handle.shards:
            raise ValueError(
                "join() was called, but ranks that shard the optimizer's state must all step "
                "equally often: leave out shard_optimizer=True"
            )
        if hasattr(self, "reducer"):
            self.reducer.start()
        return _JoinHook(self, kwargs.get("divide_by_initial_world_size", True))

    def _match_all_reduce_for_bwd_pass(self) -> None:
        self.reducer.contribute_nothing()

    def _match_unused_params_allreduce(self) -> None:
        """Does nothing: gradients carry who has used them, or the hook's end does."""


class _JoinHook(theirs._DDPJoinHook):
    """torch's own, which tells our reducer that this rank has no input any more."""

    def main_hook(self) -> None:
        reducer: Any = self.ddp.reducer  # ours, not the one that torch's class has
        reducer.has_no_input()
        super().main_hook()


def _is_from_collective(error: RuntimeError) -> bool:
    """Whether a collective has failed, rather than that torch has refused something."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals["__name__"] == "torch.distributed.utils"
