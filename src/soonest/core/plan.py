"""The plan: which pieces of the flat buffers are sent, how, and in which order."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from soonest.core.flat import ALIGN_BYTES, Flat, Slot, borders

__all__ = [
    "ALIGN_BYTES",
    "Bucket",
    "FORMAT",
    "Flat",
    "METHODS",
    "Op",
    "Plan",
    "GATHER_PARAMETERS",
    "Slot",
    "borders",
    "first_difference",
    "shards",
]

FORMAT = 1
"""Of the JSON that ``Plan.to_json`` writes."""

METHODS: dict[str, tuple[str, ...]] = {
    "allreduce": ("all_reduce",),
    "gather": ("all_gather",),
    "exchange": ("exchange",),
    "split": ("split",),
    "hierarchical": ("reduce_inside", "all_reduce_across", "all_gather_inside"),
    "shard": ("ring_reduce_scatter", "all_gather_parameters"),
    "shard_direct": ("reduce_scatter", "all_gather_parameters"),
}
"""Every method with the ops that carry it out, in the order in which they follow each other."""

GATHER_PARAMETERS = "all_gather_parameters"
"""The op that follows an update instead of preceding it; methods that end with it shard."""


def shards(method: str) -> bool:
    """Whether under this method each rank updates only its part of the parameters."""
    return METHODS[method][-1] == GATHER_PARAMETERS


@dataclass(frozen=True, slots=True)
class Bucket:
    """A contiguous slice of a flat buffer, sent as one piece.

    Args:
        flat: index of the flat buffer.
        start, stop: elements, half open.
        method: a key of ``METHODS``.
        layers: whose parameters it carries, whole or in part.
    """

    flat: int
    start: int
    stop: int
    method: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Op:
    """One collective of one bucket.

    Args:
        bucket: index of the bucket.
        kind: one of the bucket's method's ops.
        alone: whether no other is issued behind it before it is done.
    """

    bucket: int
    kind: str
    alone: bool = False


@dataclass(frozen=True)
class Plan:
    """What every rank sends, how, and in which order; the same on every rank.

    Args:
        ranks: for how many ranks it was made.
        flats: the flat buffers.
        buckets: by flat buffer and start; they cover the flat buffers without gap or overlap.
        ops: every op of every bucket once, in the order in which they are issued.
        window: how many ops may be in flight at once.
        blocking: ``optimizer.step()`` waits for all ops and updates everything at once, as with
            ``DistributedDataParallel``, instead of returning at once.

    Raises:
        ValueError: the parts do not fit each other.
    """

    ranks: int
    flats: tuple[Flat, ...]
    buckets: tuple[Bucket, ...]
    ops: tuple[Op, ...]
    window: int = 2
    blocking: bool = False

    def __post_init__(self) -> None:
        reached = [0] * len(self.flats)
        for index, bucket in enumerate(self.buckets):
            if bucket.method not in METHODS:
                raise ValueError(
                    f"bucket {index} has method {bucket.method!r}: "
                    f"the methods are {', '.join(METHODS)}"
                )
            if not 0 <= bucket.flat < len(self.flats):
                raise ValueError(f"bucket {index} lies in flat buffer {bucket.flat}, there is none")
            if bucket.start != reached[bucket.flat] or bucket.stop <= bucket.start:
                raise ValueError(
                    f"bucket {index} covers elements {bucket.start} to {bucket.stop} of flat "
                    f"buffer {bucket.flat}, but must start at {reached[bucket.flat]} and not be "
                    "empty"
                )
            reached[bucket.flat] = bucket.stop
        for index, flat in enumerate(self.flats):
            if reached[index] != flat.numel:
                raise ValueError(
                    f"the buckets cover {reached[index]} of flat buffer {index}'s "
                    f"{flat.numel} elements"
                )
        kinds: list[list[str]] = [[] for _ in self.buckets]
        for op in self.ops:
            if not 0 <= op.bucket < len(kinds):
                raise ValueError(f"an op is of bucket {op.bucket}, there is none")
            kinds[op.bucket].append(op.kind)
        for index, (bucket, found) in enumerate(zip(self.buckets, kinds, strict=True)):
            if tuple(found) != METHODS[bucket.method]:
                raise ValueError(
                    f"the ops of bucket {index} are {', '.join(found) or 'missing'}, but its "
                    f"method takes {', '.join(METHODS[bucket.method])}, in this order"
                )
        sharded = {shards(bucket.method) for bucket in self.buckets}
        gathers = [op.kind == GATHER_PARAMETERS for op in self.ops]
        if len(sharded) > 1 or gathers != sorted(gathers):
            raise ValueError(
                "a plan shards all buckets or none, and gathers parameters behind all gradients"
            )
        if self.window < 1:
            raise ValueError(f"window is {self.window}, but at least one op must be in flight")

    def bucket_bytes(self, index: int) -> int:
        """Size of a bucket's gradients in their own dtype."""
        bucket = self.buckets[index]
        return (bucket.stop - bucket.start) * self.flats[bucket.flat].itemsize

    @cached_property
    def before(self) -> tuple[int, ...]:
        """Per op, the op of the same bucket that must be done before it; -1 for the first one."""
        last: dict[int, int] = {}
        found: list[int] = []
        for index, op in enumerate(self.ops):
            found.append(last.get(op.bucket, -1))
            last[op.bucket] = index
        return tuple(found)

    @cached_property
    def sharded(self) -> bool:
        """Whether each rank updates only its part of every bucket."""
        return any(shards(bucket.method) for bucket in self.buckets)

    @cached_property
    def reducing(self) -> int:
        """How many ops reduce gradients; those behind them gather parameters."""
        return sum(op.kind != GATHER_PARAMETERS for op in self.ops)

    @cached_property
    def reduces(self) -> frozenset[int]:
        """The ops with which the gradients of a bucket are reduced."""
        last = {op.bucket: i for i, op in enumerate(self.ops) if op.kind != GATHER_PARAMETERS}
        return frozenset(last.values())

    @cached_property
    def slots_of(self) -> tuple[tuple[int, ...], ...]:
        """Per bucket, the indices of the slots (of its flat buffer) that it carries."""
        carried: list[tuple[int, ...]] = []
        for bucket in self.buckets:
            slots = self.flats[bucket.flat].slots
            carried.append(
                tuple(
                    index
                    for index, slot in enumerate(slots)
                    if slot.start < bucket.stop and bucket.start <= slot.count_at
                )
            )
        return tuple(carried)

    def describe(self, index: int) -> str:
        """One bucket in words, for messages: its index, size and layers."""
        layers = self.buckets[index].layers
        shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        return f"bucket {index} ({self.bucket_bytes(index) / 1e6:.2f} MB of {shown})"

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data, from which ``fingerprint`` is made and ``from_json`` reads."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: it is of another format, or a field is missing or unknown.
        """
        if not isinstance(data, dict):
            raise ValueError(f"this is no plan: it is a JSON {type(data).__name__}, not an object")
        if data.get("format") != FORMAT:
            raise ValueError(f"plan of format {data.get('format')!r}, this version reads {FORMAT}")
        try:
            return cls(
                ranks=data["ranks"],
                flats=tuple(
                    Flat(**{**flat, "slots": tuple(Slot(**slot) for slot in flat["slots"])})
                    for flat in data["flats"]
                ),
                buckets=tuple(
                    Bucket(**{**bucket, "layers": tuple(bucket["layers"])})
                    for bucket in data["buckets"]
                ),
                ops=tuple(Op(**op) for op in data["ops"]),
                window=data["window"],
                blocking=bool(data.get("blocking")),  # plans once had no such field
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no plan: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the ranks must agree on."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def difference(self, other: Plan) -> str | None:
        """The first thing in which two plans differ, ``path: mine / theirs``; None if equal."""
        return first_difference(self.to_json(), other.to_json())


def first_difference(mine: Any, theirs: Any, path: str = "") -> str | None:
    """The first place where two JSON values differ, in words; None if they are equal."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = [*mine, *(key for key in theirs if key not in mine)]
        pairs = [(f"{path}.{k}" if path else str(k), mine.get(k), theirs.get(k)) for k in keys]
    elif isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(mine, theirs, strict=False))]
        if len(mine) != len(theirs):
            pairs.append((f"number of {path}", len(mine), len(theirs)))
    else:
        return None if mine == theirs else f"{path}: {mine!r} / {theirs!r}"
    for where, a, b in pairs:
        if a != b:
            return first_difference(a, b, where)
    return None
