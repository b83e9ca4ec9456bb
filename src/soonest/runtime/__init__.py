"""Executes a plan inside a real training loop."""

from soonest.runtime.api import prioritize
from soonest.runtime.ddp.distributed import DistributedDataParallel
from soonest.runtime.handle import Handle

__all__ = ["DistributedDataParallel", "Handle", "prioritize"]
