"""The arguments of ``DistributedDataParallel``, and which of them are refused."""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_SIGNATURE = inspect.signature(DistributedDataParallel)
_KNOWN = {
    "module", "device_ids", "output_device", "dim", "broadcast_buffers", "init_sync",
    "process_group", "bucket_cap_mb", "find_unused_parameters", "check_reduction",
    "gradient_as_bucket_view", "static_graph", "delay_all_reduce_named_params",
    "param_to_hook_all_reduce", "mixed_precision", "device_mesh", "skip_all_reduce_unused_params",
    "bucket_cap_mb_list", "batched_grad_copy", "forward_sync_buffers",
}  # fmt: skip
"""The arguments of torch 2.13, all of them honoured or refused here."""


def given(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """By name, the arguments that torch's class is called with.

    Raises:
        TypeError: it does not take them.
    """
    return _SIGNATURE.bind(module, *args, **kwargs).arguments


def group_of(given: dict[str, Any]) -> dist.ProcessGroup | None:
    """The group that torch's class will take, if it takes one."""
    mesh = given.get("device_mesh")
    if mesh is not None:
        return mesh.get_group(mesh_dim=0) if mesh.ndim == 1 else None
    return given.get("process_group") or dist.group.WORLD


def refusal(given: dict[str, Any]) -> ValueError | None:
    """The error to raise for arguments that cannot be honoured; None if all can."""
    for name, value in given.items():
        if name not in _KNOWN:
            return ValueError(
                f"{name} is an argument of a torch newer than 2.13 and not known here: leave it out"
            )
        if name == "mixed_precision" and value is not None:
            return ValueError(
                "mixed_precision was given, but gradients are combined in the dtype that their "
                "parameters have when wrapped: use torch.autocast, and in prioritize "
                "wire_dtype=torch.bfloat16"
            )
    return None
