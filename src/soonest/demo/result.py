"""What the ranks of the demo told, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from soonest.core.cost import Network
from soonest.core.planner.bounds import lower_bound_s
from soonest.core.timeline import Timeline
from soonest.core.trace import Layer, Trace
from soonest.demo.settings import ARMS, COMPARED, RANKS, Settings

_RECENT = 10


@dataclass
class ArmResult:
    """What one arm did.

    Args:
        losses: per rank and step, nats per byte, as ``float.hex`` writes them: exact.
        seconds: per timed step, by its number.
        settled_at: the first step of the first turn that began with the plan selected; None if
            there was none.
        checksums: of the final parameters, by rank.
        test_nats: loss on the held-out text, by rank, nats per byte.
        timeline: a typical step of rank 0.
    """

    losses: list[list[str]] = field(default_factory=lambda: [[] for _ in range(RANKS)])
    seconds: dict[int, float] = field(default_factory=dict[int, float])
    settled_at: int | None = None
    checksums: dict[int, str] = field(default_factory=dict[int, str])
    test_nats: dict[int, float] = field(default_factory=dict[int, float])
    timeline: Timeline | None = None

    def recent_nats(self) -> float:
        """Rank 0's loss, mean of the last few steps."""
        return fmean(float.fromhex(loss) for loss in self.losses[0][-_RECENT:])

    def recent_s(self) -> float | None:
        """Time of a step, median of the last few."""
        return median(list(self.seconds.values())[-_RECENT:]) if self.seconds else None

    def step_s(self, warm_from: int) -> float | None:
        """Time of a step, median of all timed ones from this one on, if there are any."""
        warm = [seconds for step, seconds in self.seconds.items() if step >= warm_from]
        times = warm or list(self.seconds.values())
        return median(times) if times else None


@dataclass
class Result:
    """One run of the demo.

    Args:
        settings: what was run.
        compute_s: a forward and a backward pass, with nothing sent.
        gradient_bytes: of the whole model.
        link_bps: of the emulated hosts; None on loopback.
        arms: by name.
        layer_bytes: of the model's layers.
    """

    settings: Settings
    compute_s: float
    gradient_bytes: int
    link_bps: float | None
    arms: dict[str, ArmResult] = field(default_factory=lambda: {arm: ArmResult() for arm in ARMS})
    layer_bytes: dict[str, int] = field(default_factory=dict[str, int])

    def take(self, rank: int, message: dict[str, Any]) -> None:
        """Takes note of what a rank told while it trained."""
        arm = self.arms[message["arm"]]
        match message["kind"]:
            case "step":
                arm.losses[rank].append(message["loss"])
                if rank == 0:
                    step = len(arm.losses[0]) - 1
                    if message["seconds"] is not None:
                        arm.seconds[step] = message["seconds"]
                    if message["settled"] and arm.settled_at is None:
                        arm.settled_at = step
            case "trained":
                arm.checksums[rank] = message["checksum"]
                arm.test_nats[rank] = message["test_nats"]
            case "timeline":
                if rank == 0:
                    arm.timeline = Timeline.from_json(message["timeline"])
                    self.layer_bytes = message["layer_bytes"]
            case kind:
                raise AssertionError(kind)

    def differences(self) -> list[str]:
        """In what the compared arms differ, one sentence each; empty if in nothing at all."""
        one, other = (self.arms[name] for name in COMPARED)
        found: list[str] = []
        for rank, pair in enumerate(zip(one.losses, other.losses, strict=True)):
            if [len(losses) for losses in pair] != [self.settings.steps] * 2:
                found.append(f"rank {rank} did not finish all steps of both")
            for step, (a, b) in enumerate(zip(*pair, strict=False)):
                if a != b:
                    told = f"{float.fromhex(a):.9g} and {float.fromhex(b):.9g}"
                    found.append(f"rank {rank}: the losses differ from step {step + 1} on, {told}")
                    break
        sums = {
            f"{ARMS[name]} on rank {rank}": self.arms[name].checksums.get(rank, "none")
            for name in COMPARED
            for rank in range(RANKS)
        }
        if len(set(sums.values())) > 1:
            told = ", ".join(f"{total} ({who})" for who, total in sums.items())
            found.append(f"the final parameters differ: their checksums are {told}")
        return found

    @property
    def warm_turns(self) -> int:
        """So many turns are not timed: the first, and those in which plans are still on trial.

        If they did so until the end, there is nothing else to time.
        """
        turns = self.settings.turns("soonest")
        at = self.arms["soonest"].settled_at
        return max(1, -(-at // turns[0])) if at is not None else 1

    def step_ms(self, arm: str) -> float | None:
        """Median time of a step, milliseconds, in those turns that are timed, the same of all."""
        warm_from = sum(self.settings.turns(arm)[: self.warm_turns])
        seconds = self.arms[arm].step_s(warm_from)
        return None if seconds is None else seconds * 1e3

    def speedup(self, arm: str, over: str = "ddp") -> float | None:
        """How many times as fast an arm is as another."""
        mine, theirs = self.step_ms(arm), self.step_ms(over)
        return theirs / mine if mine and theirs else None

    @property
    def test_bits(self) -> float:
        """Bits per byte on the held-out text, by soonest's model."""
        return fmean(self.arms["soonest"].test_nats.values()) / math.log(2)

    @property
    def bound_ms(self) -> float | None:
        """Milliseconds that no schedule can beat on this link; None where its rate is not known.

        The shares of the layers are those that they have in DDP's timeline; together they take as
        long as when nothing is sent.
        """
        timeline = self.arms["ddp"].timeline
        if self.link_bps is None or timeline is None:
            return None
        times: dict[tuple[str, str], float] = {}
        for span in timeline.of("forward", "backward"):
            took_us = (span.end_s - span.start_s) * 1e6
            times[span.name, span.kind] = times.get((span.name, span.kind), 0.0) + took_us
        scale = self.compute_s * 1e6 / sum(times.values())
        layers = tuple(
            Layer(name, size, scale * times[name, "forward"], scale * times[name, "backward"])
            for name in dict.fromkeys(span.name for span in timeline.of("forward"))
            if (size := self.layer_bytes[name])
        )
        network = Network.ideal(RANKS, self.link_bps)
        return lower_bound_s(Trace("the demo's", layers), network) * 1e3

    def timelines(self) -> list[Timeline]:
        """Of the compared arms."""
        return [found for name in COMPARED if (found := self.arms[name].timeline) is not None]

    def to_json(self) -> dict[str, Any]:
        arms = {
            name: {
                "step_ms": self.step_ms(name),
                "step_ms_all": [seconds * 1e3 for seconds in arm.seconds.values()],
                "losses": [[float.fromhex(x) for x in losses] for losses in arm.losses],
                "checksums": list(arm.checksums.values()),
                "timeline": arm.timeline.to_json() if arm.timeline else None,
            }
            for name, arm in self.arms.items()
        }
        return {
            "hosts": RANKS,
            "link_bps": self.link_bps,
            "settings": asdict(self.settings),
            "compute_ms": self.compute_s * 1e3,
            "gradient_bytes": self.gradient_bytes,
            "bound_ms": self.bound_ms,
            "speedup": self.speedup("soonest"),
            "identical": not self.differences(),
            "differences": self.differences(),
            "test_bits_per_byte": self.test_bits,
            "arms": arms,
        }
