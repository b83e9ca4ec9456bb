"""Plans with the very buckets that torch's ``DistributedDataParallel`` makes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch._C import _distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]

from soonest.core.plan import METHODS, Bucket, Flat, Op, Plan
from soonest.core.planner.ddp_buckets import CAP_BYTES
from soonest.runtime.flat.buffers import flats_for


def whole_plan(
    named: Sequence[tuple[str, str, nn.Parameter]],
    *,
    ranks: int,
    caps_bytes: Sequence[int] = (),
    window: int | None = None,
) -> Plan:
    """Makes a plan with the buckets of ``DistributedDataParallel``, of whole parameters.

    Args:
        named: what ``trainable`` gave.
        ranks: how many.
        caps_bytes: bytes of gradients from which a bucket is closed, for the first ones; the last
            value holds for all others. DDP's own default if there are none.
        window: how many ops may be in flight; all of them if None.
    """
    for name, _, parameter in named:
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}, and neither buckets of a given size nor "
                "communication hooks can have complex ones here: leave out both"
            )
    flats = flats_for(named)
    limits = list(caps_bytes) or [CAP_BYTES]
    found, _ = _distributed_c10d._compute_bucket_assignment_by_size(
        [p for _, _, p in named], limits
    )
    at = {slot.name: (index, slot) for index, flat in enumerate(flats) for slot in flat.slots}
    sent: list[Bucket] = []
    for indices in reversed(found):
        places = [at[named[index][0]] for index in indices]
        flat, first = places[0]
        stop = _end(flats[flat], places[-1][1].start)
        layers = tuple(dict.fromkeys(slot.layer for _, slot in places))
        sent.append(Bucket(flat, first.start, stop, "allreduce", layers))
    buckets = sorted(sent, key=lambda bucket: (bucket.flat, bucket.start))
    (kind,) = METHODS["allreduce"]
    ops = tuple(Op(buckets.index(bucket), kind) for bucket in sent)
    return Plan(ranks, flats, tuple(buckets), ops, window or len(ops))


def _end(flat: Flat, start: int) -> int:
    """Where the slot ends that starts here, with the gap behind it."""
    starts = [slot.start for slot in flat.slots]
    return [*starts[1:], flat.numel][starts.index(start)]
