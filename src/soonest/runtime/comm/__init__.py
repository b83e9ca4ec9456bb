"""All that goes over the network: ops, groups, messages; nothing else calls torch's collectives."""

from soonest.runtime.comm.broadcast import Sent, broadcast, broadcast_of, start_broadcast
from soonest.runtime.comm.bucket_view import EXACT, Piece, Wire
from soonest.runtime.comm.objects import (
    Gathering,
    first_rank_object,
    gather_numbers,
    gather_objects,
    gather_scalars,
    last_of,
    start_sum,
    sum_small,
)
from soonest.runtime.comm.ops import Op, Running, op, reduce, run, start
from soonest.runtime.comm.topology import Group, Ranks, check_method
from soonest.runtime.comm.unfinished import never_free
from soonest.runtime.comm.waiting import (
    LOOK_S,
    Work,
    ended,
    finish,
    look,
    looking,
    waited_s,
    waiting,
)

__all__ = [
    "EXACT",
    "Gathering",
    "LOOK_S",
    "Group",
    "Op",
    "Piece",
    "Ranks",
    "Running",
    "Sent",
    "Wire",
    "Work",
    "broadcast",
    "broadcast_of",
    "check_method",
    "ended",
    "finish",
    "first_rank_object",
    "gather_numbers",
    "gather_objects",
    "gather_scalars",
    "last_of",
    "look",
    "looking",
    "never_free",
    "op",
    "reduce",
    "run",
    "start",
    "start_broadcast",
    "start_sum",
    "sum_small",
    "waited_s",
    "waiting",
]
