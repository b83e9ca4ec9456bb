"""Soonest needed, soonest sent: synchronous data-parallel training for slow networks."""

from soonest.core.plan import Plan
from soonest.core.timeline import Timeline
from soonest.errors import PeerLostError, PlanMismatchError, ReadTooEarlyError, SoonestError
from soonest.runtime import Handle, prioritize

__all__ = [
    "Handle",
    "PeerLostError",
    "Plan",
    "PlanMismatchError",
    "ReadTooEarlyError",
    "SoonestError",
    "Timeline",
    "prioritize",
]
