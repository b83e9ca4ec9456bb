"""What a comparison found, and what follows from it."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from soonest.bench.settings import Settings
from soonest.core.planner.planner import flats_of, make_plan
from soonest.core.simulator.simulate import step_time_s
from soonest.core.timeline import Timeline
from soonest.core.units import rate_text

BASELINE = "ddp-tuned"
BUSY = 0.85
"""Cores with a larger load than this hold up what they run."""
COMPUTE_ERROR = 0.01
"""How far the replayed compute may be from what was asked."""


@dataclass(frozen=True)
class Row:
    """One arm.

    Args:
        arm: its name.
        step_ms: median, in the trace's own milliseconds.
        over_bound: times the bound.
        speedup: over the baseline, or None without one.
        hidden: share of the communication during which computing went on, 0 to 1, at the rate of
            the links; None for an arm that does not communicate.
        load: of the machine's cores, 0 to 1.
    """

    arm: str
    step_ms: float
    over_bound: float
    speedup: float | None
    hidden: float | None
    load: float


@dataclass(frozen=True)
class Result:
    """One comparison, as its record holds it.

    Args:
        record: see ``record_of``.
    """

    record: Mapping[str, Any]

    @property
    def title(self) -> str:
        record = self.record
        return (
            f"{record['trace']}, {record['hosts']} hosts, links of {rate_text(record['link_bps'])}"
        )

    def rows(self) -> list[Row]:
        """The arms, in the order in which they took turns."""
        arms = self.record["arms"]
        floor_ms = self.record["compute_ms"]
        baseline = arms.get(BASELINE)
        return [
            Row(
                name,
                arm["step_ms"],
                arm["step_ms"] / self.record["bound_ms"],
                baseline["step_ms"] / arm["step_ms"] if baseline else None,
                None if name == "local" else self._hidden(arm["step_ms"] - floor_ms),
                arm["load"],
            )
            for name, arm in arms.items()
        ]

    def _hidden(self, seen_ms: float) -> float:
        return min(1.0, max(0.0, 1 - seen_ms / self.record["communication_ms"]))

    def warnings(self) -> list[str]:
        """Why not to take the figures at their face value, one sentence each."""
        found: list[str] = []
        arms: Mapping[str, Any] = self.record["arms"]
        busy = [f"{name} {arm['load']:.0%}" for name, arm in arms.items() if arm["load"] > BUSY]
        if busy:
            found.append(
                f"The cores, not the links, may have limited this run (load: {', '.join(busy)}): "
                "give more --slow-motion or --shrink."
            )
        late = [
            f"{name} {arm['compute_error']:+.1%}"
            for name, arm in arms.items()
            if abs(arm["compute_error"]) > COMPUTE_ERROR
        ]
        if late:
            found.append(
                f"This machine cannot keep the time of the replayed compute ({', '.join(late)}): "
                "give more --slow-motion or --shrink."
            )
        return found

    def timelines(self) -> list[Timeline]:
        return [Timeline.from_json(step) for step in self.record.get("timelines", {}).values()]


def record_of(
    settings: Settings, name: str, absent: Mapping[str, str], told: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of a comparison, as JSON holds it.

    All times are in the trace's own milliseconds, that is, divided by the slow motion.

    Args:
        settings: what was compared.
        name: of the trace, as the user gave it.
        absent: why arms that were asked for are not there, by name.
        told: what the ranks told at the end.
    """
    trace, network = settings.trace, settings.network
    plan = make_plan(trace, flats_of(trace), network, ranks=settings.hosts)
    return {
        "trace": name,
        "hosts": settings.hosts,
        "link_bps": settings.link_bps,
        "shaped_link_bps": settings.shaped_bps,
        "slow_motion": settings.slow_motion,
        "shrink": settings.shrink,
        "steps": settings.steps,
        "rounds": settings.rounds,
        "method": settings.method,
        "compute_ms": (trace.forward_s + trace.backward_s) * 1e3,
        "communication_ms": settings.communication_s * 1e3,
        "bound_ms": settings.bound_s * 1e3,
        "predicted_soonest_ms": step_time_s(trace, plan, network) * 1e3,
        "machine": machine(),
        "absent": dict(absent),
        "arms": {
            arm: {
                "step_ms": statistics.median(steps),
                "step_ms_all": steps,
                "load": told["load"][arm],
                "compute_error": told["compute_error"][arm],
                **told["notes"][arm],
            }
            for arm, steps in told["step_ms"].items()
        },
        "timelines": told["timelines"],
    }


def machine() -> dict[str, Any]:
    """What a record says of the machine it was made on."""
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }
