"""The log of a ``DistributedDataParallel``: settings and measured times.

``_get_ddp_logging_data`` shows it.
Its names are those of torch's own logger, the figures those of the engine. Times are nanoseconds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from soonest.core.plan import GATHER_PARAMETERS, Plan
from soonest.runtime.execute.pass_state import PassState
from soonest.runtime.timing.step_record import Record

_FIRST = 10
"""Iterations of which all times are logged; after them, one in as many as the sample rate says."""
_ENVIRONMENT = {
    "master_addr": "MASTER_ADDR",
    "master_port": "MASTER_PORT",
    "torch_distributed_debug": "TORCH_DISTRIBUTED_DEBUG",
    "cuda_visible_devices": "CUDA_VISIBLE_DEVICES",
}
_OF_BACKEND = {
    "gloo": {
        "gloo_socket_ifname": "GLOO_SOCKET_IFNAME",
        "gloo_device_transport": "GLOO_DEVICE_TRANSPORT",
    },
    "nccl": {
        "nccl_socket_ifname": "NCCL_SOCKET_IFNAME",
        "nccl_blocking_wait": "TORCH_NCCL_BLOCKING_WAIT",
        "nccl_async_error_handling": "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "nccl_debug": "NCCL_DEBUG",
        "nccl_nthreads": "NCCL_NTHREADS",
        "nccl_ib_timeout": "NCCL_IB_TIMEOUT",
    },
}
_C_NAMES = {torch.float16: "c10::Half", torch.bfloat16: "c10::BFloat16", torch.float64: "double"}


@dataclass
class Data:
    """Two tables, as torch's logger has them."""

    strs_map: dict[str, str] = field(default_factory=dict[str, str])
    ints_map: dict[str, int] = field(default_factory=dict[str, int])


class Times(NamedTuple):
    """Begins and ends of the parts of one iteration, seconds on one clock."""

    forward_began: float
    backward_began: float
    backward_ended: float
    sending_began: float
    sending_ended: float

    @classmethod
    def of(cls, forward_began: float, record: Record) -> Times | None:
        """The times in the record of a backward pass; None if it has not been reduced yet."""
        started = [at for at in record.op_start if not math.isnan(at)]
        ended = [at for at in record.op_end if not math.isnan(at)]
        if not ended or math.isnan(record.backward_ended + forward_began):
            return None
        began = max(record.backward_began, forward_began)
        return cls(forward_began, began, record.backward_ended, min(started), max(ended))


class Log:
    """Acts as the logger of torch's own ``DistributedDataParallel``.

    Args:
        parameters: that are synchronized, as registered.
        group: over which ranks.
        settings: further entries, numbers or text.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: dist.ProcessGroup,
        settings: dict[str, int | str],
    ) -> None:
        self._data = Data()
        self._iteration = 0
        self._sample_rate = 100
        self._taken: dict[str, list[int]] = {}
        backend = dist.get_backend(group)
        variables = {**_ENVIRONMENT, **_OF_BACKEND.get(backend, {})}
        self.note(
            {
                **settings,
                "iteration": 0,
                "world_size": group.size(),
                "rank": group.rank(),
                "backend_name": backend,
                "dtypes": ", ".join(
                    dict.fromkeys(_name(p.dtype) for p in sorted(parameters, key=_dtype))
                ),
                "num_parameter_tensors": len(parameters),
                "total_parameter_size_bytes": sum(p.nbytes for p in parameters),
                **{key: os.environ.get(name, "N/A") for key, name in variables.items()},
            }
        )
        if backend == "gloo":
            self.note({"gloo_num_threads": 2})

    def note(self, entries: dict[str, int | str]) -> None:
        """Adds entries, or replaces them."""
        for key, value in entries.items():
            if isinstance(value, str):
                self._data.strs_map[key] = value
            else:
                self._data.ints_map[key] = int(value)

    def forward_begins(self, times: Times | None) -> None:
        """Logs a synchronizing forward pass that begins, with the times of the one before."""
        sampled = self._iteration <= _FIRST or self._iteration % self._sample_rate == 0
        if sampled:
            self.note({"iteration": self._iteration})
            if times is not None:
                self._take(times)
        self._iteration += 1

    def _take(self, times: Times) -> None:
        spans = {
            "forward_compute_time": times.backward_began - times.forward_began,
            "backward_compute_time": times.backward_ended - times.backward_began,
            "backward_comm_time": times.sending_ended - times.sending_began,
            "backward_compute_comm_overlap_time": max(
                0.0, min(times.backward_ended, times.sending_ended) - times.sending_began
            ),
        }
        for name, span_s in spans.items():
            taken = self._taken.setdefault(name, [])
            taken.append(_ns(span_s))
            self.note({name: taken[-1], f"avg_{name}": round(mean(taken))})
        self.note(
            {
                "forward_compute_time_start": _ns(times.forward_began),
                "backward_compute_time_start": _ns(times.backward_began),
                "backward_compute_time_end": _ns(times.backward_ended),
                "backward_comm_time_start": _ns(times.sending_began),
                "backward_comm_time_end": _ns(times.sending_ended),
            }
        )

    def sample(self, rate: int) -> None:
        """Sets every how many iterations times are logged."""
        self._sample_rate = rate

    def set_error_and_log(self, error: str) -> None:
        self.note({"has_error": 1, "error": error})

    def set_runtime_stats_and_log(self) -> None:
        """Does nothing when torch's class calls it: ``forward_begins`` does this here."""

    def _set_static_graph(self) -> None:
        self.note({"static_graph": 1})

    def _set_uneven_input_join(self) -> None:
        self.note({"join_uneven_inputs": 1})

    def _set_comm_hook_name(self, name: str) -> None:
        self.note({"comm_hook": name})

    def _get_ddp_logging_data(self) -> Data:
        return self._data


def of_plan(plan: Plan, index_of: dict[str, int], *, rebuilt: bool) -> dict[str, int | str]:
    """Entries of the log that show the buckets in the order in which they are sent.

    Args:
        plan: in use.
        index_of: by name of the parameter, its place among all.
        rebuilt: whether it is no longer the first one.
    """
    order = dict.fromkeys(op.bucket for op in plan.ops if op.kind != GATHER_PARAMETERS)
    sizes: list[str] = []
    indices: list[str] = []
    for index in order:
        bucket = plan.buckets[index]
        flat = plan.flats[bucket.flat]
        slots = [flat.slots[slot] for slot in plan.slots_of[index]]
        numel = sum(
            max(0, min(bucket.stop, slot.start + slot.numel) - max(bucket.start, slot.start))
            for slot in slots
        )
        sizes.append(str(numel * flat.itemsize))
        indices.append(" ".join(str(index_of[slot.name]) for slot in reversed(slots)))
    entries: dict[str, int | str] = {
        "bucket_sizes": ", ".join(sizes),
        "num_buckets_reduced": len(sizes),
    }
    if rebuilt:
        entries["has_rebuilt_buckets"] = 1
        entries["rebuilt_bucket_sizes"] = ", ".join(sizes)
        entries["rebuilt_per_bucket_param_indices"] = ", ".join(indices)
    return entries


def of_order(pass_state: PassState, index_of: dict[str, int]) -> dict[str, int | str]:
    """Entries of the log that show in which order gradients were ready in a pass."""
    ready = pass_state.record.ready
    order = sorted(pass_state.bound_plan.layout.params, key=lambda param: ready[param.order])
    indices = ", ".join(str(index_of[param.name]) for param in order)
    return {"prev_iteration_grad_ready_order_indices": indices}


def of_use(unused_bytes: int, *, alike: bool) -> dict[str, int | str]:
    """Entries of the log that show which parameters backward passes use.

    Args:
        unused_bytes: size of those that got no gradient in the last one.
        alike: they were the same in all.
    """
    return {"unused_parameter_size": unused_bytes, "can_set_static_graph": alike}


def _ns(seconds: float) -> int:
    return max(1, round(seconds * 1e9)) if seconds > 0 else 0


def _name(dtype: torch.dtype) -> str:
    return _C_NAMES.get(dtype, str(dtype).removeprefix("torch.").removesuffix("32"))


def _dtype(parameter: nn.Parameter) -> Any:
    return _name(parameter.dtype)
