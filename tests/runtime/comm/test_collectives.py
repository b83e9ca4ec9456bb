"""One suite for every method: the same sums as a slow, obvious reference, on every rank."""

from __future__ import annotations

import zlib
from functools import cache
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.ranks import run_ranks
from soonest.core.plan import METHODS, borders, shards
from soonest.runtime import comm
from soonest.runtime.comm import groups

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (1, 2, 3, 15, 16, 17, 31, 127, 1000, 4099, 70_001)
IN_RANK_ORDER = ("gather", "exchange", "split", "shard_direct")
"""Methods whose sums do not depend on how data are cut."""


@cache
def values(rank: int, size: int, dtype: torch.dtype, *, exact: bool) -> Tensor:
    """What one rank brings. Every rank can make it, for all. Not to be written to."""
    if exact:  # sums of these are representable in every dtype
        return ((torch.arange(size) * (rank + 3) + rank) % 7 - 3).to(dtype)
    noise = torch.Generator().manual_seed(1000 * size + rank)
    return torch.randn(size, generator=noise).to(dtype)


@cache
def reference(ranks: int, size: int, dtype: torch.dtype, *, exact: bool) -> Tensor:
    total = torch.zeros(size, dtype=torch.float64)
    for rank in range(ranks):
        total += values(rank, size, dtype, exact=exact).double()
    return total


@cache
def in_order(ranks: int, size: int, dtype: torch.dtype) -> Tensor:
    """The sum with every addition rounded to float32 at least, in the order of ranks."""
    total = values(0, size, dtype, exact=False).to(torch.promote_types(dtype, torch.float32))
    for rank in range(1, ranks):
        total = total + values(rank, size, dtype, exact=False)
    return total.to(dtype)


def bits(tensor: Tensor) -> int:
    contiguous = tensor.clone(memory_format=torch.contiguous_format)
    return zlib.crc32(contiguous.view(torch.uint8).numpy())


def ranks_with_hosts() -> comm.Ranks:
    """Two ranks a host, where that is possible."""
    group = groups.private_group(None, None)
    return groups.ranks_of(group, f"host {dist.get_rank() // 2}")


def check(
    method: str,
    ranks: comm.Ranks,
    size: int,
    dtype: torch.dtype,
    *,
    layout: str = "contiguous",
    exact: bool = False,
) -> str:
    """What came out: what is wrong with it, or else its bits, the same on all ranks."""
    n, rank = dist.get_world_size(), dist.get_rank()
    tensor = values(rank, size, dtype, exact=exact).clone()
    spread = torch.full((size, 3), -7.0, dtype=dtype)
    if layout == "strided":
        spread[:, 1] = tensor
        tensor = spread[:, 1]
    elif layout == "transposed":
        tensor = tensor[: size // 2 * 2].view(2, -1).t()
    comm.reduce(method, ranks, tensor)
    if not bool((spread[:, ::2] == -7).all()):
        return f"rank {rank} wrote outside"
    found = tensor.t().reshape(-1) if layout == "transposed" else tensor
    wanted = reference(n, size, dtype, exact=exact)[: found.numel()]
    near = 0.0 if exact else n * torch.finfo(dtype).eps * n
    if not torch.allclose(found.double(), wanted, rtol=near, atol=near):
        return f"rank {rank} is off by {(found.double() - wanted).abs().max():g}"
    ordered = method in IN_RANK_ORDER and not exact
    if ordered and not torch.equal(found, in_order(n, size, dtype)[: found.numel()]):
        return f"rank {rank} did not sum in the order of ranks"
    return f"bits {bits(tensor)}"


def conform() -> dict[str, str]:
    ranks = ranks_with_hosts()
    found = {
        f"{method}, {dtype}, {size}": check(method, ranks, size, dtype)
        for method, dtype, size in product(ranks.methods, DTYPES, SIZES)
    }
    for method, layout in product(ranks.methods, ("strided", "transposed")):
        for size in (2, 1000):
            out = check(method, ranks, size, torch.float32, layout=layout, exact=True)
            found[f"{method}, {size} {layout}"] = out
    for method in ranks.methods:
        comm.reduce(method, ranks, torch.empty(0, 3))
        scalar = torch.tensor(2.0)
        comm.reduce(method, ranks, scalar)
        found[f"{method}, scalar"] = f"bits {float(scalar) / dist.get_world_size()}"
    return found


@pytest.mark.parametrize("n", range(1, 9))
def test_every_method_sums(n: int) -> None:
    first, *others = run_ranks(conform, n, timeout_s=250)
    assert len(first) > 6 * len(DTYPES) * len(SIZES)
    assert [f"{case}: {out}" for case, out in first.items() if not out.startswith("bits")] == []
    assert all(first[f"{method}, scalar"] == "bits 2.0" for method in IN_RANK_ORDER)
    assert others == [first] * (n - 1)


def large(size: int) -> dict[str, str]:
    ranks = ranks_with_hosts()
    return {m: check(m, ranks, size, torch.float32, exact=True) for m in ranks.methods}


@pytest.mark.parametrize(("n", "size"), [(2, 1 << 24), (4, (1 << 21) + 5)])
def test_large_tensors(n: int, size: int) -> None:
    """Up to 64 MB."""
    first, *others = run_ranks(large, n, size, timeout_s=250)
    assert set(first) >= set(IN_RANK_ORDER)
    assert len(set(first.values())) == 1
    assert first["allreduce"].startswith("bits")
    assert others == [first] * (n - 1)


def narrowed(wire: torch.dtype) -> dict[str, tuple[int, float]]:
    """By method: the bits, the same on all ranks, and the mean error."""
    ranks = ranks_with_hosts()
    n, size = dist.get_world_size(), 5003
    found: dict[str, tuple[int, float]] = {}
    for method in ranks.methods:
        tensor = values(dist.get_rank(), size, torch.float32, exact=False).clone()
        comm.reduce(method, ranks, tensor, wire=wire)
        error = (tensor.double() - reference(n, size, torch.float32, exact=False)).abs()
        found[method] = bits(tensor), float(error.mean())
    return found


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
def test_a_narrow_wire_loses_little(wire: torch.dtype) -> None:
    n = 4
    first, *others = run_ranks(narrowed, n, wire)
    assert others == [first] * (n - 1)
    for method, (_, error) in first.items():
        # n inputs are rounded, and some partial sums.
        assert 0 < error < 1.5 * n * torch.finfo(wire).eps, method
    # What is summed here accumulates in float32: less is lost than where the backend sums.
    assert first["exchange"][1] < first["allreduce"][1]
    assert first["gather"] == first["exchange"]


def hosts_found(hosts: list[str]) -> tuple[tuple[str, ...], list[int] | None, list[int] | None]:
    group = groups.private_group(None, None)
    ranks = groups.ranks_of(group, hosts[dist.get_rank()])
    inside, across = (
        dist.get_process_group_ranks(found) if found else None
        for found in (ranks.inside, ranks.across)
    )
    return ranks.methods, inside, across


def test_ranks_find_out_who_shares_their_host() -> None:
    without = tuple(name for name in METHODS if name != "hierarchical")
    found = run_ranks(hosts_found, 4, ["b", "a", "b", "a"])
    assert found == [
        (tuple(METHODS), [0, 2], [0, 1]),
        (tuple(METHODS), [1, 3], [0, 1]),
        (tuple(METHODS), [0, 2], [2, 3]),
        (tuple(METHODS), [1, 3], [2, 3]),
    ]
    for hosts in (["a"] * 4, ["a", "b", "c", "d"], ["a", "a", "a", "b"]):
        assert run_ranks(hosts_found, 4, hosts) == [(without, None, None)] * 4


def refusals() -> list[str]:
    ranks = groups.ranks_of(groups.private_group(None, None))
    said: list[str] = []
    for method in ("pigeon", "hierarchical"):
        with pytest.raises(ValueError) as refused:
            comm.reduce(method, ranks, torch.zeros(3))
        said.append(str(refused.value))
    return said


def test_a_method_that_is_not_there_is_refused() -> None:
    for unknown, lacking in run_ranks(refusals, 2):
        assert unknown.startswith("no method 'pigeon': there are allreduce, gather")
        assert "needs several hosts" in lacking
        assert "take another method" in lacking


@pytest.mark.parametrize(("numel", "ranks", "itemsize"), [(1, 8, 4), (1000, 3, 2), (64, 4, 4)])
def test_parts_cover_a_slice(numel: int, ranks: int, itemsize: int) -> None:
    at = borders(numel, ranks, itemsize)
    assert (at[0], at[-1], len(at)) == (0, numel, ranks + 1)
    assert at == sorted(at)
    assert all(border * itemsize % 64 == 0 for border in at if border < numel)


def test_methods_that_shard() -> None:
    assert [name for name in METHODS if shards(name)] == ["shard", "shard_direct"]
