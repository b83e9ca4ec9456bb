"""The ops of which the methods consist that reduce a bucket, and how one is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from soonest.core.plan import METHODS, borders
from soonest.runtime.comm import unfinished
from soonest.runtime.comm.bucket_view import Piece, Wire
from soonest.runtime.comm.messages import receive, send
from soonest.runtime.comm.topology import Group, Ranks, check_method
from soonest.runtime.comm.waiting import Work, finish

Op = Iterator[Work]
"""An op as a generator: whoever runs it waits for each work that it yields, then goes on with it.

All ranks' pieces have the same size and dtypes. Afterwards ``gradients``, or this rank's part of
them, are the sums over all ranks, or ``parameters`` are those of each part's owner.
"""


def all_reduce(ranks: Ranks, piece: Piece) -> Op:
    """The backend's own all-reduce; rounding depends on where in the piece an element lies."""
    sent = piece.packed()
    yield ranks.group.allreduce([sent])
    piece.unpack(sent)


def all_gather(ranks: Ranks, piece: Piece) -> Op:
    """Every rank gets all gradients and sums them in the order of ranks."""
    sent = piece.packed()
    every = sent.new_empty(ranks.group.size() * sent.numel())
    yield ranks.group.all_gather_single(every, sent)
    _sum_in_order(every, ranks.group.size(), piece.gradients)


def exchange(ranks: Ranks, piece: Piece) -> Op:
    """As ``all_gather``, but every rank sends to every other directly, in one hop.

    An all-to-all of copies: gloo closes all connections when waiting for a single message times
    out, and here that is how one notices that another rank has given up.
    """
    sent = piece.packed().repeat(ranks.group.size())
    every = torch.empty_like(sent)
    yield ranks.group.all_to_all_single(every, sent, [], [])
    _sum_in_order(every, ranks.group.size(), piece.gradients)


def reduce_scatter(ranks: Ranks, piece: Piece) -> Op:
    """Every rank gets its part of everybody's gradients directly, and sums that."""
    yield from _scatter_sum(ranks.group, piece)


def ring_reduce_scatter(ranks: Ranks, piece: Piece) -> Op:
    """Partial sums go round the ranks once, each adding its gradients: for large pieces.

    So every link carries one stream at a time, which TCP uses better than many (P. Patarasuk and
    X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", J. Parallel
    Distrib. Comput. 69, 2009). With a wire dtype partial sums would be rounded on each hop, and
    are not sent.
    """
    if piece.wire.gradients:
        yield from reduce_scatter(ranks, piece)
        return
    if ranks.native:
        yield from _native_reduce_scatter(ranks.group, piece.gradients)
        return
    group, whole = ranks.group, piece.gradients
    n, rank = group.size(), group.rank()
    parts = [whole[start:stop] for start, stop in pairwise(_borders(whole, n))]
    # The sum of part k sets out from rank k + 1, so it ends on rank k.
    passing = [parts[(rank - hop) % n] for hop in range(1, n + 1)]
    coming = [torch.empty_like(part) for part in passing[1:]]
    # Receives first: what arrives unexpected has to be asked for, and waits for that.
    receives = [receive(group, part, (rank - 1) % n, hop) for hop, part in enumerate(coming)]
    sends: list[Work] = []
    going = passing[0]
    for hop, part in enumerate(coming):
        sends += send(group, going, (rank + 1) % n, hop)
        yield from receives[hop]
        going = part.add_(passing[hop + 1])
    yield from sends
    passing[-1].copy_(going)


def split(ranks: Ranks, piece: Piece) -> Op:
    """Every rank gets its part of everybody's gradients, sums that, and sends it to everybody."""
    yield from _scatter_sum(ranks.group, piece)
    yield from _gather_parts(ranks.second, piece)


def all_gather_parameters(ranks: Ranks, piece: Piece) -> Op:
    """Every rank's part of the parameters goes round to every other."""
    group, whole, narrow = ranks.group, piece.parameters, piece.wire.parameters
    at = borders(whole.numel(), group.size(), piece.itemsize or whole.element_size())
    mine = whole[at[group.rank()] : at[group.rank() + 1]]
    size = at[1]
    even = at[-1] == size * group.size()
    sent = torch.empty(size, dtype=narrow or whole.dtype, device=whole.device)
    sent[: mine.numel()] = mine
    every = whole if even and not narrow else sent.new_empty(size * group.size())
    yield group.all_gather_single(every, sent)
    if every is not whole:
        whole.copy_(every[: whole.numel()])


def reduce_inside(ranks: Ranks, piece: Piece) -> Op:
    """Every rank gets its part of the gradients of its host's ranks, and sums that."""
    assert ranks.inside
    yield from _scatter_sum(ranks.inside, piece)


def all_reduce_across(ranks: Ranks, piece: Piece) -> Op:
    """Each rank sums its part over the hosts."""
    assert ranks.inside
    assert ranks.across
    sent = piece.packed(_own(piece.gradients, ranks.inside))
    if sent.numel():
        yield ranks.across.allreduce([sent])
    piece.unpack(sent, _own(piece.gradients, ranks.inside))


def all_gather_inside(ranks: Ranks, piece: Piece) -> Op:
    """The ranks of a host give each other their parts."""
    assert ranks.inside
    yield from _gather_parts(ranks.inside, piece)


_OPS: dict[str, Callable[[Ranks, Piece], Op]] = {
    op.__name__: op
    for op in (
        all_reduce,
        all_gather,
        exchange,
        reduce_scatter,
        ring_reduce_scatter,
        split,
        all_gather_parameters,
        reduce_inside,
        all_reduce_across,
        all_gather_inside,
    )
}


class Running:
    """An op in flight.

    Args:
        op: it begins now.

    Attributes:
        work: to wait for before ``go_on``; None when the op is over.
    """

    def __init__(self, op: Op) -> None:
        self._op = op
        self.work: Work | None = None
        self.go_on()

    def go_on(self) -> None:
        """Goes on with the op, whose work has ended, until there is something to wait for again."""
        if self.work is not None:
            unfinished.over(self.work)
        self.work = next(self._op, None)
        if self.work is not None:
            unfinished.begun(self.work)


def op(kind: str, ranks: Ranks, piece: Piece) -> Op:
    """Makes one op of a plan; it begins when it is first asked what to wait for."""
    return _OPS[kind](ranks, piece)


def start(kind: str, ranks: Ranks, piece: Piece) -> Running:
    """Starts one op of a plan."""
    return Running(op(kind, ranks, piece))


def run(kind: str, ranks: Ranks, piece: Piece) -> None:
    """Carries out one op and waits for it; a collective call."""
    for work in _OPS[kind](ranks, piece):
        finish(work, on_device=ranks.native)


def reduce(method: str, ranks: Ranks, tensor: Tensor, *, wire: torch.dtype | None = None) -> None:
    """Sums a tensor over the ranks by one method, in place, and waits for it; a collective call.

    With ``shard`` the parts that ranks sum are gathered like parameters.

    Args:
        method: a key of ``METHODS``.
        ranks: over which.
        tensor: of any shape, strides and floating dtype; the same on every rank.
        wire: dtype in which to send it, its own if None.

    Raises:
        ValueError: there is no such method, or not on these ranks.
    """
    check_method(method, ranks)
    if not tensor.numel() or ranks.group.size() == 1:
        return
    flat = tensor.contiguous().view(-1)
    piece = Piece(flat, flat, Wire(wire))
    for kind in METHODS[method]:
        run(kind, ranks, piece)
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))


def _sum_in_order(every: Tensor, n: int, out: Tensor) -> None:
    """Sums ``n`` tensors that lie one behind the other: so the bits are the same on every rank."""
    exact = torch.promote_types(out.dtype, torch.float32)
    first, *others = every.view(n, -1).unbind()
    if not others:
        out.copy_(first)
    elif every.dtype == out.dtype == exact:
        torch.add(first, others[0], out=out)
        for other in others[1:]:
            out.add_(other)
    else:
        total = first.to(exact)
        for other in others:
            total += other
        out.copy_(total)


def _borders(whole: Tensor, n: int) -> list[int]:
    return borders(whole.numel(), n, whole.element_size())


def _own(whole: Tensor, group: Group) -> slice:
    at = _borders(whole, group.size())
    return slice(at[group.rank()], at[group.rank() + 1])


def _sizes(whole: Tensor, group: Group) -> tuple[list[int], int]:
    """Elements of every rank's part, and of this rank's."""
    sizes = [stop - start for start, stop in pairwise(_borders(whole, group.size()))]
    return sizes, sizes[group.rank()]


def _scatter_sum(group: Group, piece: Piece) -> Op:
    sizes, mine = _sizes(piece.gradients, group)
    sent = piece.packed()
    every = sent.new_empty(group.size() * mine)
    yield group.all_to_all_single(every, sent, [mine] * group.size(), sizes)
    _sum_in_order(every, group.size(), piece.gradients[_own(piece.gradients, group)])


def _native_reduce_scatter(group: Group, whole: Tensor) -> Op:
    """The backend's own, which wants parts of equal size."""
    part = _borders(whole, group.size())[1]
    sent = whole
    if part * group.size() != whole.numel():
        sent = whole.new_zeros(part * group.size())
        sent[: whole.numel()] = whole
    mine = whole.new_empty(part)
    yield group.reduce_scatter_single(mine, sent, dist.ReduceScatterOptions())
    own = whole[_own(whole, group)]
    own.copy_(mine[: own.numel()])


def _gather_parts(group: Group, piece: Piece) -> Op:
    sizes, mine = _sizes(piece.gradients, group)
    sent = piece.packed(_own(piece.gradients, group)).repeat(group.size())
    every = sent.new_empty(piece.gradients.numel()) if piece.wire.gradients else piece.gradients
    yield group.all_to_all_single(every, sent, sizes, [mine] * group.size())
    piece.unpack(every)
