"""Executes a plan inside a real training loop."""

from soonest.runtime.api import Handle, prioritize

__all__ = ["Handle", "prioritize"]
