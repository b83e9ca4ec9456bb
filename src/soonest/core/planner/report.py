"""Why a plan reduces each bucket as it does, and how long that takes: predicted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from soonest.core.cost import Network
from soonest.core.plan import Plan


@dataclass(frozen=True)
class Row:
    """What the report says of one bucket.

    Args:
        bucket: its index.
        layers: whose parameters it carries.
        size_bytes: of its gradients.
        method: how it is reduced.
        predicted_s: by the network as calibrated and at the pace seen in training, alone on it.
        measured_s: for which it kept the network busy, in the median step; None before any.
        why: in words.
    """

    bucket: int
    layers: tuple[str, ...]
    size_bytes: int
    method: str
    predicted_s: float
    measured_s: float | None
    why: str


@dataclass(frozen=True)
class Report:
    """All buckets, in the order in which they are first sent.

    Args:
        rows: one per bucket.
        notes: what else there is to say, one sentence each.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}

    def __str__(self) -> str:
        if not self.rows:
            return "\n".join(self.notes)
        head = ("bucket", "bytes", "method", "predicted ms", "measured ms", "layers", "why")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        right = (0, 1, 3, 4)
        table = [
            "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*table, *self.notes])


def explain(
    plan: Plan,
    network: Network,
    *,
    choices: Sequence[str],
    measured_s: Sequence[float | None],
    given: str | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Explains a plan.

    Args:
        plan: to explain.
        network: what each op costs by now.
        choices: methods that the plan could choose from.
        measured_s: per bucket, see ``Row``.
        given: why the method was no choice of the plan's, if it was none.
        notes: for the report.
    """
    rows: dict[int, Row] = {}
    for op in plan.ops:
        bucket, size = plan.buckets[op.bucket], plan.bucket_bytes(op.bucket)
        cost_s = {m: network.cost_s(m, size) for m in network.methods if m in choices}
        others = sorted((cost, m) for m, cost in cost_s.items() if m != bucket.method)
        why = given or "the only method to choose"
        if not given and others:
            other_s, other = others[0]
            cheapest = "cheapest; " if network.cost_s(bucket.method, size) <= other_s else ""
            why = f"{cheapest}{other} would take {other_s * 1e3:.3g} ms"
        rows.setdefault(
            op.bucket,
            Row(
                op.bucket,
                bucket.layers,
                size,
                bucket.method,
                network.cost_s(bucket.method, size),
                measured_s[op.bucket],
                why,
            ),
        )
    return Report(tuple(rows.values()), tuple(notes))


def busy_s(plan: Plan, spans: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds for which each bucket kept the network busy.

    An op in flight beside the one ahead of it counts from the end of that.

    Args:
        plan: whose ops.
        spans: start and end of each op, in the plan's order.
    """
    busy = [0.0] * len(plan.buckets)
    reached = float("-inf")
    for op, (start, end) in zip(plan.ops, spans, strict=True):
        busy[op.bucket] += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def _cells(row: Row) -> tuple[str, ...]:
    shown = ", ".join(row.layers[:2]) + (
        f" and {len(row.layers) - 2} more" if len(row.layers) > 2 else ""
    )
    return (
        str(row.bucket),
        f"{row.size_bytes:,}",
        row.method,
        f"{row.predicted_s * 1e3:.2f}",
        "" if row.measured_s is None else f"{row.measured_s * 1e3:.2f}",
        shown,
        row.why,
    )
