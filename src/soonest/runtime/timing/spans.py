"""Spans for ``torch.profiler``: a trace names what soonest does, and for which layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.autograd import profiler

from soonest.core.plan import Plan

_NOTHING = nullcontext()


def span(name: Callable[..., str], *args: Any) -> AbstractContextManager[Any]:
    """Shows the code within this context under a name in the user's profile, if a profiler runs.

    The threads of a lane show up with ``profile_all_threads=True`` in the profiler's
    ``experimental_config``.

    Args:
        name: gives the name without ``soonest::``; called only if a profiler runs.
        args: what it is called with.
    """
    if not profiler._is_profiler_enabled:  # a look costs less than a span that nobody records
        return _NOTHING
    return profiler.record_function(f"soonest::{name(*args)}")


def of_bucket(what: str, plan: Plan, bucket: int) -> str:
    """Names something done with a bucket: ``all_reduce bucket 3 (encoder.0 ... encoder.2)``.

    In ASCII, as exported traces leave out events with other characters in their names.
    """
    layers = plan.buckets[bucket].layers
    shown = layers[0] if len(layers) == 1 else f"{layers[0]} ... {layers[-1]}" if layers else ""
    return f"{what} bucket {bucket} ({shown})"


def of_op(plan: Plan, op: int) -> str:
    """Names an op of a plan in the same way."""
    return of_bucket(plan.ops[op].kind, plan, plan.ops[op].bucket)
