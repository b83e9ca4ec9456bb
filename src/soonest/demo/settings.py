"""What a run of the demo is made of; the same for every rank and every arm."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

RANKS = 2

ARMS = {
    "ddp": "DistributedDataParallel",
    "ddp-small": "DistributedDataParallel, 1 MB buckets",
    "soonest": "soonest",
}
"""The ways of training, and what to call them."""

COMPARED = ("ddp", "soonest")
"""Those that train to the end. The others take shorter turns: they are there to be timed."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All that decides the results.

    Args:
        steps: of training, of each arm that is compared.
        turn: the arms take turns, so many steps each.
        timed_turn: the same for arms that are only timed.
        batch: pieces of text per rank and step.
        seed: of the parameters and of the data.
        learning_rate: at its peak.
        warmup: steps until there.
        test_pieces: of held-out text, over all ranks.
        pictured: steps behind the others of which one is shown as a timeline.
    """

    steps: int = 100
    turn: int = 10
    timed_turn: int = 4
    batch: int = 6
    seed: int = 1
    learning_rate: float = 8e-4
    warmup: int = 10
    test_pieces: int = 128
    pictured: int = 6

    def turns(self, arm: str) -> list[int]:
        """The steps of each turn of an arm."""
        turns = [min(self.turn, self.steps - at) for at in range(0, self.steps, self.turn)]
        return turns if arm in COMPARED else [min(turn, self.timed_turn) for turn in turns]

    @classmethod
    def of(cls, steps: int) -> Settings:
        """A run of so many steps; a short one is short in everything."""
        usual = cls()
        return replace(
            usual,
            steps=steps,
            pictured=min(steps + 1, usual.pictured),
            test_pieces=min(steps * usual.batch * RANKS, usual.test_pieces),
        )

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Settings:
        return cls(**json.loads(text))
