"""Which lane a model gets: that depends on the device that it is on."""

from __future__ import annotations

import torch
import torch.distributed as dist

from soonest.runtime.comm import Group, groups
from soonest.runtime.comm.failures import FailureReporter
from soonest.runtime.device.streams import DeviceStreams
from soonest.runtime.execute.lane import Lane
from soonest.runtime.execute.stream_lane import StreamLane
from soonest.runtime.execute.thread_lane import ThreadLane


def lane_for(group: Group, device: torch.device, failures: FailureReporter) -> Lane:
    """The lane for a model on this device.

    Args:
        group: over which gradients are reduced.
        device: of all buffers.
        failures: asks the other ranks who is at fault, and tells them what is wrong here.
    """
    timeout_s = groups.timeout_of(group)
    if device.type == "cpu":
        return ThreadLane(timeout_s=timeout_s, failures=failures)
    broken = groups.failure_of(group, device)
    return StreamLane(DeviceStreams(device), timeout_s=timeout_s, failures=failures, broken=broken)


def has_lane(device: torch.device) -> bool:
    """Whether there is a lane for a device of this type."""
    if device.type == "cpu":
        return True
    here = torch.accelerator.current_accelerator()
    streams = here is not None and hasattr(torch.get_device_module(here), "Stream")
    return streams and here is not None and here.type == device.type


def check_group(group: Group, device: torch.device) -> None:
    """Raises ValueError if a group cannot reduce what is on this device."""
    backends = dist.get_backend_config(group)
    if f"{device.type}:" not in backends:
        raise ValueError(
            f"the model is on {device}, but the process group reduces only what is on "
            f"{backends.replace(':', ' (by ').replace(',', '), ')}): give "
            "init_process_group() a backend for it"
        )
    if device.type == "cpu" or device.index is None:
        return
    current = torch.accelerator.current_device_index()
    if current != device.index:
        raise ValueError(
            f"the model is on {device}, but this process works on {device.type}:{current}: call "
            f"torch.{device.type}.set_device({device.index}) before prioritize()"
        )
