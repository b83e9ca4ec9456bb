"""Over which ranks gradients are reduced, and by which methods that can be done."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from soonest.core.plan import METHODS

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Ranks:
    """The ranks that reduce gradients together, and how they are connected.

    Args:
        group: all of them.
        second: a second communicator over the same ranks, for the second half of an op with two.
            That begins when the first half ends, which is before the next op is issued on one rank
            and behind it on another; on ``group`` the two would be taken for each other.
        inside: the ranks that share this one's host; None if no two share one, if all do, or if
            hosts have different numbers of ranks.
        across: on each host the rank with this one's place there; None along with ``inside``.
        native: the backend has a true reduce-scatter, and single messages are not to be sent.
        control: for what ranks tell each other between steps. On ``group`` a rank that is elsewhere
            would take it for a bucket of another size, and end. ``group`` itself if None.
    """

    group: Group
    second: Group
    inside: Group | None = None
    across: Group | None = None
    native: bool = False
    control: Group | None = None

    @property
    def talk(self) -> Group:
        """The group on which ranks tell each other what is no part of a plan."""
        return self.control or self.group

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that these ranks can carry out."""
        return tuple(name for name in METHODS if name != "hierarchical" or self.inside)


def check_method(method: str, ranks: Ranks) -> None:
    """Raises ValueError if there is no such method, or not on these ranks."""
    if method not in METHODS:
        raise ValueError(f"no method {method!r}: there are {', '.join(METHODS)}")
    if method not in ranks.methods:
        raise ValueError(
            f"method {method!r} needs several hosts with the same number of ranks, two or more, on "
            "each: take another method, or start the ranks so"
        )
