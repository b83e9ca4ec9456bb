"""Soonest needed, soonest sent: synchronous data-parallel training for slow networks."""

from typing import TYPE_CHECKING, Any

from soonest.core.plan import METHODS, Plan
from soonest.core.timeline import Timeline
from soonest.errors import PeerLostError, PlanMismatchError, ReadTooEarlyError, SoonestError

if TYPE_CHECKING:
    from soonest.runtime import DistributedDataParallel, Handle, prioritize

__all__ = [
    "METHODS",
    "DistributedDataParallel",
    "Handle",
    "PeerLostError",
    "Plan",
    "PlanMismatchError",
    "ReadTooEarlyError",
    "SoonestError",
    "Timeline",
    "prioritize",
]


def __getattr__(name: str) -> Any:
    """Imports the runtime, and torch with it, when it is first asked for."""
    if name in ("DistributedDataParallel", "Handle", "prioritize"):
        from soonest import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module 'soonest' has no attribute {name!r}")
