"""What a step has not come to do when training ends in the middle of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from soonest.runtime.execute.bound_plan import Program
from soonest.runtime.execute.pass_state import Sweep
from soonest.runtime.flat.buffers import Member

_NAMED = 3


def undone(program: Program) -> str:
    """Which parameters lack what of a step, in words; nothing if none do."""
    stepped = [sweep for sweep in program.unfinished if sweep.step is not None]
    parts: list[str] = []
    for sweep in sorted(stepped, key=lambda sweep: sweep.number):
        torn = [member for member in _owned(program, sweep) if _is_torn(program, sweep, member)]
        stale = [member for member in _owned(program, sweep) if _is_stale(program, sweep, member)]
        if torn:
            parts.append(f"{_names(torn)} in part {_have(torn)} the values of step {sweep.number}")
        if stale:
            parts.append(f"{_names(stale)} {_lack(stale)} the update of step {sweep.number}")
    return " and ".join(parts)


def _owned(program: Program, sweep: Sweep) -> Iterator[Member]:
    return (m for m in program.layout.members if m.order in sweep.step.gradients)


def _touched(sweep: Sweep, bucket: int) -> bool:
    return bool(sweep.updated[bucket] or sweep.shared[bucket])


def _is_torn(program: Program, sweep: Sweep, member: Member) -> bool:
    """Whether elements of it are of this step, and others of the one before."""
    if not sweep.plan.sharded:  # then it is updated as a whole
        return False
    buckets = program.buckets_of[member.order]
    whole = all(sweep.updated[bucket] for bucket in buckets)
    return not whole and any(_touched(sweep, bucket) for bucket in buckets)


def _is_stale(program: Program, sweep: Sweep, member: Member) -> bool:
    """Whether it is as the step before has left it."""
    if not sweep.plan.sharded:
        return not sweep.updated[program.last_of[member.order]]
    return not any(_touched(sweep, bucket) for bucket in program.buckets_of[member.order])


def _names(members: Sequence[Member]) -> str:
    names = ", ".join(repr(member.name) for member in members[:_NAMED])
    more = len(members) - _NAMED
    return names + (f" and {more} more" if more > 0 else "")


def _have(members: Sequence[Member]) -> str:
    return "has" if len(members) == 1 else "have"


def _lack(members: Sequence[Member]) -> str:
    return "lacks" if len(members) == 1 else "lack"
