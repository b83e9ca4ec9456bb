"""What goes over the network; the only file that names torch's collectives."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from soonest.core.plan import METHODS, borders

Group = dist.ProcessGroup


class Work(Protocol):
    """Something in flight."""

    def wait(self, timeout: datetime.timedelta = ...) -> bool: ...
    def is_completed(self) -> bool: ...


@dataclass(frozen=True)
class Ranks:
    """The ranks that combine, and how they can talk.

    Args:
        group: all of them.
        second: the same once more, for what follows inside an op: on ``group`` it would come before
            the next op on one rank and behind it on another.
        inside: those that share this rank's host; None if no two share one, if all do, or if hosts
            have different numbers of ranks.
        across: on each host the one with this rank's place there; None along with ``inside``.
        native: the backend has a true reduce-scatter, and single messages are not to be sent.
    """

    group: Group
    second: Group
    inside: Group | None = None
    across: Group | None = None
    native: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that these ranks can carry out."""
        return tuple(name for name in METHODS if name != "hierarchical" or self.inside)


@dataclass(frozen=True)
class Wire:
    """The dtypes in which things are sent; None stands for their own.

    Args:
        gradients: sums are rounded to it in between where the backend makes them, and accumulate
            in float32 where this rank does.
        parameters: that ranks share out.
    """

    gradients: torch.dtype | None = None
    parameters: torch.dtype | None = None

    def of(self, itemsize: int) -> Wire:
        """For elements of so many bytes: dtypes that are no narrower are left out."""

        def narrower(dtype: torch.dtype | None) -> torch.dtype | None:
            return dtype if dtype and dtype.itemsize < itemsize else None

        return Wire(narrower(self.gradients), narrower(self.parameters))


EXACT = Wire()


@dataclass(frozen=True)
class Piece:
    """One bucket's part of the buffers of this rank.

    Args:
        gradients: contiguous, of any floating dtype, ``numel`` elements.
        parameters: the same part of the buffer of parameters.
        wire: how they are sent.
        itemsize: bytes of an element by which the ranks' parts are aligned, if not its own.
    """

    gradients: Tensor
    parameters: Tensor
    wire: Wire = EXACT
    itemsize: int | None = None

    def packed(self, part: slice = slice(None)) -> Tensor:
        """Gradients as they are sent."""
        wire = self.wire.gradients
        return self.gradients[part].to(wire) if wire else self.gradients[part]

    def unpack(self, received: Tensor, part: slice = slice(None)) -> None:
        """Takes over what was sent; equal on every rank, as the sender takes it over as well."""
        if self.wire.gradients:
            self.gradients[part].copy_(received)


Op = Iterator[Work]
"""An op: what it yields it waits for, one after the other, and what follows is this rank's work.

All ranks' pieces have the same size and dtypes. Afterwards ``gradients``, or this rank's part of
them, are the sums over all ranks, or ``parameters`` are those of each part's owner.
"""


def all_reduce(ranks: Ranks, piece: Piece) -> Op:
    """The backend's own sum. Rounding depends on where in the piece an element lies."""
    sent = piece.packed()
    yield ranks.group.allreduce([sent])
    piece.unpack(sent)


def all_gather(ranks: Ranks, piece: Piece) -> Op:
    """All ranks get everything and sum it in the order of ranks."""
    sent = piece.packed()
    every = sent.new_empty(ranks.group.size() * sent.numel())
    yield ranks.group.all_gather_single(every, sent)
    _sum_in_order(every, ranks.group.size(), piece.gradients)


def exchange(ranks: Ranks, piece: Piece) -> Op:
    """As ``all_gather``, but every rank sends to every other directly: one hop for all.

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
    """Partial sums go round once, each rank adding its share: for large pieces.

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
    receives = [_receive(group, part, (rank - 1) % n, hop) for hop, part in enumerate(coming)]
    sends: list[Work] = []
    going = passing[0]
    for hop, part in enumerate(coming):
        sends += _send(group, going, (rank + 1) % n, hop)
        yield from receives[hop]
        going = part.add_(passing[hop + 1])
    yield from sends
    passing[-1].copy_(going)


def split(ranks: Ranks, piece: Piece) -> Op:
    """Every rank gets its part of everybody's gradients, sums that, and sends it to everybody."""
    yield from _scatter_sum(ranks.group, piece)
    yield from _share_parts(ranks.second, piece)


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
    """The ranks of a host share out the gradients, and each sums its part of theirs."""
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
    yield from _share_parts(ranks.inside, piece)


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
        op: what it does; it begins now.
    """

    def __init__(self, op: Op) -> None:
        self._op = op
        self.work = next(op, None)

    def go_on(self) -> None:
        """What was waited for has ended: does what follows until there is something to wait for."""
        self.work = next(self._op, None)


def start(kind: str, ranks: Ranks, piece: Piece) -> Running:
    """Starts one op of a plan."""
    return Running(_OPS[kind](ranks, piece))


def run(kind: str, ranks: Ranks, piece: Piece) -> None:
    """Carries out one op and waits for it; a collective call."""
    for work in _OPS[kind](ranks, piece):
        work.wait()


def combine(method: str, ranks: Ranks, tensor: Tensor, *, wire: torch.dtype | None = None) -> None:
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


def check_method(method: str, ranks: Ranks) -> None:
    """Raises ValueError if there is no such method, or not on these ranks."""
    if method not in METHODS:
        raise ValueError(f"no method {method!r}: there are {', '.join(METHODS)}")
    if method not in ranks.methods:
        raise ValueError(
            f"method {method!r} needs several hosts with the same number of ranks, two or more, on "
            "each: take another method, or start the ranks so"
        )


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


def _share_parts(group: Group, piece: Piece) -> Op:
    sizes, mine = _sizes(piece.gradients, group)
    sent = piece.packed(_own(piece.gradients, group)).repeat(group.size())
    every = sent.new_empty(piece.gradients.numel()) if piece.wire.gradients else piece.gradients
    yield group.all_to_all_single(every, sent, sizes, [mine] * group.size())
    piece.unpack(every)


class _Message:
    """A message in flight. Waiting for it must not time out early: gloo would close all."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        return self._work.wait()

    def is_completed(self) -> bool:
        return False


def _receive(group: Group, part: Tensor, source: int, tag: int) -> list[Work]:
    return [_Message(group.recv([part], source, tag))] if part.numel() else []


def _send(group: Group, part: Tensor, target: int, tag: int) -> list[Work]:
    return [_Message(group.send([part], target, tag))] if part.numel() else []


_keeping_versions: Any = torch.autograd._unsafe_preserve_version_counter  # pyright: ignore[reportPrivateImportUsage]


class Sent:
    """Tensors of one dtype on their way from one rank to all.

    Args:
        group: all ranks.
        tensors: what the source has is sent as it is now; the others' are overwritten.
        source: the rank from which.
        apart: they may be written to meanwhile.

    Attributes:
        on_device: to wait for the work is then no matter of the host.
    """

    def __init__(
        self, group: Group, tensors: Sequence[Tensor], source: int, *, apart: bool = False
    ) -> None:
        self._tensors = None if group.rank() == source else tuple(tensors)
        joined = _flatten_dense_tensors(tensors)
        self._joined = _sendable(group, joined)
        if apart and len(tensors) == 1 and self._joined is joined:
            self._joined = joined.clone()
        self.on_device = self._joined.device.type != "cpu"
        self.work: Work = group.broadcast(self._joined.view(torch.uint8), source)

    @property
    def memory(self) -> Tensor:
        """What they are sent in."""
        return self._joined

    def unpack(self) -> None:
        """Overwrites the tensors, once the work is done."""
        if self._tensors is not None:
            values = _unflatten_dense_tensors(self._joined, self._tensors)
            # As with DistributedDataParallel, a backward pass that has saved one goes on.
            with _keeping_versions(self._tensors):
                for tensor, value in zip(self._tensors, values, strict=True):
                    tensor.copy_(value)


def broadcast(group: Group, tensors: Sequence[Tensor], source: int = 0) -> None:
    """Overwrites tensors by those of one rank of the group; a collective call."""
    for batch in _batches(tensors):
        sent = Sent(group, batch, source)
        sent.work.wait()
        sent.unpack()


def broadcast_of(group: Group, tensors: Sequence[Tensor], *, mine: bool) -> None:
    """As ``broadcast``, from the last rank that has what counts."""
    broadcast(group, tensors, last_of(group, mine=mine))


def last_of(group: Group, *, mine: bool) -> int:
    """The last rank for which something is so; a collective call.

    Args:
        group: all ranks.
        mine: for this one it is.
    """
    return round(max(gather_numbers(group, group.rank() if mine else -1)))


def start_broadcast(group: Group, tensors: Sequence[Tensor], source: int) -> list[Sent]:
    """As ``broadcast``, but what it returns is to be waited for and then unpacked."""
    return [Sent(group, batch, source, apart=True) for batch in _batches(tensors)]


def _batches(tensors: Sequence[Tensor], limit_bytes: int = 64 << 20) -> list[list[Tensor]]:
    """Tensors of one dtype on one device, so many that a batch needs not much extra memory."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    batches: list[list[Tensor]] = []
    for some in alike.values():
        room = -1
        for tensor in some:
            if tensor.nbytes > room:
                batches.append([])
                room = limit_bytes
            batches[-1].append(tensor)
            room -= tensor.nbytes
    return batches


def sum_small(group: Group, tensor: Tensor) -> None:
    """Sums a small tensor over the ranks, in place, and waits for it; a collective call."""
    sent = _sendable(group, tensor)
    group.allreduce([sent]).wait()
    if sent is not tensor:
        tensor.copy_(sent)


def _sendable(group: Group, tensor: Tensor) -> Tensor:
    """A tensor, or a copy of it on a device that the group's backend sends from."""
    if any(device.type == tensor.device.type for device in group._device_types):
        return tensor
    return tensor.to(dist.distributed_c10d._get_object_coll_device(group))


def gather_objects(group: Group, value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_numbers(group: Group, value: float) -> list[float]:
    """Every rank's value, by rank; cheaper than ``gather_objects``."""
    mine = _sendable(group, torch.tensor(value, dtype=torch.float64))
    return gather_scalars(group, mine).tolist()


def gather_scalars(group: Group, value: Tensor) -> Tensor:
    """Every rank's number, in the order of ranks; on a device the host does not wait for it."""
    every = value.new_empty(group.size())
    group.all_gather_single(every, value.view(1)).wait()
    return every


def first_rank_object(group: Group, value: Any) -> Any:
    """The value of the group's first rank."""
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def barrier(group: Group) -> None:
    group.barrier().wait()
