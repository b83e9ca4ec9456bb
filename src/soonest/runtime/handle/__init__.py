"""What ``prioritize`` returns: the plan, what was measured, checkpoints, and the way out."""

from soonest.runtime.handle.base import is_shared
from soonest.runtime.handle.handle import Handle

__all__ = ["Handle", "is_shared"]
