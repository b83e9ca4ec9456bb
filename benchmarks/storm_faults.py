"""What may happen to a rank in the storm, and what must come of it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

STEPS = 14


class Ending(Enum):
    """What must come of a fault."""

    NAMED = "every other rank ends in time with an error that names the rank at fault"
    ENDED = "every other rank ends in time, or training goes on as without the fault"
    GOES_ON = "training goes on, bit for bit as without the fault"
    ALIKE = "training goes on, and all ranks have the same bits"


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
        ending: what must come of it.
        at_start: it is there from the start, so nothing has been trained that could be lost.
        others: ranks may be named beside the one at fault, as it is a matter between ranks.
        links: it happens to a link, so ranks are emulated hosts.
        sharded: it can be told where the optimizer's state is shared out, too.
        checked: ``SOONEST_CHECK`` is to find it.
    """

    ending: Ending
    at_start: bool = False
    others: bool = False
    links: bool = False
    sharded: bool = True
    checked: bool = False


_LOST = Kind(Ending.NAMED)
_OTHER = Kind(Ending.NAMED, at_start=True, others=True)
_UNEVEN = Kind(Ending.NAMED, others=True)
_FLIP = Kind(Ending.NAMED, others=True, sharded=False, checked=True)
_HARMLESS = Kind(Ending.GOES_ON)

KINDS: dict[str, Kind] = {
    "kill": _LOST,
    "end": _LOST,
    "terminate": _LOST,
    "stop": _LOST,
    "sleep": _LOST,
    "destroy": _LOST,
    "raise": _LOST,
    "raise in backward": _LOST,
    "raise in optimizer": _LOST,
    "interrupt": _LOST,
    "out of memory": _LOST,
    "Ctrl-C": _LOST,
    "Ctrl-C twice": _LOST,
    "kill while saving": _LOST,
    "raise in dcp.save": Kind(Ending.ENDED),
    "kill in dcp.save": Kind(Ending.ENDED),
    "cut link": Kind(Ending.NAMED, links=True),
    "skip step": _UNEVEN,
    "skip backward": _UNEVEN,
    "damaged state": _UNEVEN,
    "other model": _OTHER,
    "other option": _OTHER,
    "other rate": _OTHER,
    "other buffer": _OTHER,
    "other frozen parameter": _OTHER,
    "damaged plan": _OTHER,
    "flipped bit of a parameter": _FLIP,
    "flipped bit of the state": _FLIP,
    "store gone": Kind(Ending.ENDED),
    "nan": Kind(Ending.ALIKE),
    "inf": Kind(Ending.ALIKE),
    "nothing": _HARMLESS,
    "pause": _HARMLESS,
    "late": _HARMLESS,
    "paused by signals": _HARMLESS,
    "staggered start": _HARMLESS,
    "clock jumps": _HARMLESS,
    "fork": _HARMLESS,
    "full disk": _HARMLESS,
    "slow link": Kind(Ending.GOES_ON, links=True),
    "link cut for a second": Kind(Ending.GOES_ON, links=True),
}

POINTS = ("forward", "backward", "op", "step", "after")
"""Where in a step: ``op`` is the start of a collective call, in a thread of soonest's."""

_BETWEEN = ("forward", "step", "after")
_WHERE: dict[str, tuple[str, ...]] = {
    "raise in backward": ("backward",),
    "raise in optimizer": ("step",),
    "interrupt": ("step",),
    "kill while saving": _BETWEEN,
    "raise in dcp.save": _BETWEEN,
    "kill in dcp.save": _BETWEEN,
    "damaged state": ("after",),
    "full disk": _BETWEEN,
    "flipped bit of a parameter": ("after",),
    "flipped bit of the state": ("after",),
    "fork": ("forward", "backward", "step", "after"),
}


@dataclass(frozen=True)
class Configuration:
    """How ranks train.

    Args:
        options: of ``prioritize``.
        ranks: how many there must be; any number if 0.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 0

    @property
    def sharded(self) -> bool:
        return self.options.get("shard_optimizer", False)


CONFIGURATIONS: dict[str, Configuration] = {
    "plain": Configuration(),
    "gather": Configuration({"method": "gather"}),
    "exchange": Configuration({"method": "exchange"}),
    "split": Configuration({"method": "split"}),
    "hierarchical": Configuration({"method": "hierarchical"}, ranks=4),
    "sharded": Configuration({"shard_optimizer": True}),
    "sharded in a ring": Configuration({"shard_optimizer": True, "method": "shard"}),
    "sharded, rounded": Configuration(
        {"shard_optimizer": True, "parameter_wire_dtype": torch.bfloat16}
    ),
    # By one method: others round sums elsewhere, and plans are made from what is measured.
    "rounded": Configuration({"wire_dtype": torch.bfloat16, "method": "allreduce"}),
    "clipped": Configuration(),
    "accumulated": Configuration(),
    "unused parameters": Configuration(),
    "two optimizers": Configuration(),
    "compiled block": Configuration(),
    "drop-in": Configuration(),
    "drop-in, prioritized": Configuration(),
}


@dataclass(frozen=True)
class Fault:
    """What happens.

    Args:
        seed: which drew it.
        kind: a key of ``KINDS``.
        ranks: how many train.
        rank: to whom it happens.
        configuration: a key of ``CONFIGURATIONS``.
        step, point: when.
        hosts_store: the key-value store lives in the first rank, and not with a launcher.
    """

    seed: int
    kind: str
    ranks: int
    rank: int
    configuration: str
    step: int
    point: str
    hosts_store: bool

    @classmethod
    def drawn(cls, seed: int) -> Fault:
        """The one that belongs to a seed."""
        dice = random.Random(seed)
        kind = dice.choice(list(KINDS))
        possible = [
            name
            for name, how in CONFIGURATIONS.items()
            if (KINDS[kind].sharded or not how.sharded)
            and not (KINDS[kind].links and how.ranks)
            and not (kind == "other option" and name == "drop-in")
            and not (kind == "damaged plan" and name == "drop-in")
        ]
        configuration = dice.choice(possible)
        ranks = CONFIGURATIONS[configuration].ranks or dice.choice((2, 2, 3, 3, 4, 6, 8))
        if KINDS[kind].links:
            ranks = min(ranks, 4)
        point = dice.choice(_WHERE.get(kind, POINTS))
        hosts_store = KINDS[kind].links or (kind != "store gone" and dice.random() < 0.3)
        step, rank = dice.randrange(1, STEPS - 1), dice.randrange(ranks)
        return cls(seed, kind, ranks, rank, configuration, step, point, hosts_store)

    @property
    def checked(self) -> bool:
        """Whether ``SOONEST_CHECK`` is to find it.

        The drop-in class alone sees no optimizer: a step that is left out, or another rate, is as
        silent as with torch's class.
        """
        unseen = self.configuration == "drop-in" and self.kind in ("skip step", "other rate")
        return KINDS[self.kind].checked or unseen

    def quiet(self) -> Fault:
        """The same training in which nothing happens."""
        return Fault(
            self.seed, "nothing", self.ranks, 0, self.configuration, 1, "after", False
        )  # fmt: skip
