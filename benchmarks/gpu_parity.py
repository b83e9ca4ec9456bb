"""Ways of training on a GPU that must come out as with DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

STEPS = 24
"""More than the first few, so that several plans have their turns."""

Prioritize = Callable[..., Any]
"""Called with model, optimizer, device and options; gives a handle."""


class Net(nn.Module):
    """Convolutions, and a tail of linear layers of which one depends on the rank if asked for."""

    def __init__(
        self, *, branch: bool = False, recompute: bool = False, batch: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32) if batch else nn.GroupNorm(4, 32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.GroupNorm(4, 64), nn.ReLU(),
        )  # fmt: skip
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64)
        self.block = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
        self.last = nn.Linear(64, 10)
        self.branch, self.recompute = branch, recompute

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x).mean((2, 3))
        if not self.branch:
            hidden = self.left(self.right(hidden))
        else:
            hidden = (self.left if dist.get_rank() % 2 else self.right)(hidden)
        if self.recompute:
            hidden = checkpoint(self.block, hidden, use_reentrant=False)  # type: ignore[assignment]
        else:
            hidden = self.block(hidden)
        return self.last(hidden)


def _channels_last() -> nn.Module:
    return Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _compiled() -> nn.Module:
    model = Net()
    model.block.compile(backend="aot_eager")
    return model


def _sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def _fused(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)


def _capturable(model: nn.Module) -> Optimizer:
    rate = torch.tensor(1e-2, device=next(model.parameters()).device)
    return torch.optim.Adam(model.parameters(), lr=rate, eps=1e-3, capturable=True)


@dataclass(frozen=True)
class Case:
    """One way of training.

    Args:
        model, optimizer: build them.
        dtype: of autocast.
        scaled: by a GradScaler.
        clip: norm to clip to.
        accumulate: backward passes per step, all but the last without combining.
        zero_after: gradients are set to zero after the step instead of to none before it.
        average: parameters are averaged on a side stream after each step.
        unused: parameters may get no gradient.
        offloaded: what the backward pass needs waits in pinned memory of the host.
        options: further ones of ``prioritize``.
    """

    model: Callable[[], nn.Module] = Net
    optimizer: Callable[[nn.Module], Optimizer] = _adamw
    dtype: torch.dtype | None = None
    scaled: bool = False
    clip: float | None = None
    accumulate: int = 1
    zero_after: bool = False
    average: bool = False
    unused: bool = False
    offloaded: bool = False
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


CASES = {
    "SGD": Case(optimizer=_sgd),
    "AdamW": Case(),
    "AdamW fused": Case(optimizer=_fused),
    "Adam capturable, rate on the device": Case(optimizer=_capturable),
    "channels last": Case(_channels_last, _sgd),
    "bfloat16": Case(optimizer=_fused, dtype=torch.bfloat16),
    "float16, scaled": Case(dtype=torch.float16, scaled=True),
    "float16, scaled, fused": Case(optimizer=_fused, dtype=torch.float16, scaled=True),
    "float16, scaled, clipped": Case(optimizer=_sgd, dtype=torch.float16, scaled=True, clip=0.5),
    "clipped": Case(clip=0.5),
    "accumulated": Case(accumulate=3),
    "zeroed after the step": Case(optimizer=_sgd, zero_after=True),
    "averaged on a side stream": Case(average=True),
    "BatchNorm": Case(lambda: Net(batch=True)),
    "recomputed": Case(lambda: Net(recompute=True)),
    "offloaded": Case(offloaded=True),
    "a block compiled": Case(_compiled),
    "a branch by rank": Case(lambda: Net(branch=True), unused=True),
    "all by gather": Case(options={"method": "gather"}),
    "all by exchange": Case(options={"method": "exchange"}),
    "all by split": Case(options={"method": "split"}),
    "sharded": Case(options={"shard_optimizer": True}),
    "sharded directly": Case(options={"shard_optimizer": True, "method": "shard_direct"}),
}


def train(case: Case, device: torch.device, prioritize: Prioritize | None) -> list[Tensor]:
    """Losses, averages, parameters and optimizer state after some steps, on the CPU.

    Args:
        case: how to train.
        device: where.
        prioritize: makes a handle; ``DistributedDataParallel`` trains if None.
    """
    torch.manual_seed(1)
    model = case.model().to(device)
    optimizer = case.optimizer(model)
    handle = None
    called: nn.Module = model
    if prioritize is None:
        called = DistributedDataParallel(
            model,
            device_ids=[device.index],
            gradient_as_bucket_view=True,
            find_unused_parameters=case.unused,
        )
    else:
        handle = prioritize(model, optimizer, device, **case.options)
    no_sync: Any = called.no_sync if handle is None else handle.no_sync
    scaler = torch.amp.GradScaler("cuda", enabled=case.scaled)
    side = torch.cuda.Stream(device)
    averages = [torch.zeros_like(p) for p in model.parameters()]
    data = torch.Generator().manual_seed(100 + dist.get_rank())
    losses: list[Tensor] = []
    for _ in range(STEPS):
        if not case.zero_after:
            optimizer.zero_grad()
        for part in range(case.accumulate):
            x = torch.randn(8, 3, 16, 16, generator=data).to(device)
            labels = torch.randint(10, (8,), generator=data).to(device)
            with no_sync() if part < case.accumulate - 1 else nullcontext():
                with (
                    torch.autocast("cuda", case.dtype, enabled=case.dtype is not None),
                    save_on_cpu(pin_memory=True) if case.offloaded else nullcontext(),
                ):
                    loss = F.cross_entropy(called(x), labels)
                scaler.scale(loss).backward()
            losses.append(loss.detach())
        if case.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        scaler.step(optimizer)
        scaler.update()
        if case.zero_after:
            optimizer.zero_grad(set_to_none=False)
        if case.average:
            here = torch.cuda.current_stream()
            side.wait_stream(here)
            with torch.cuda.stream(side), torch.no_grad():
                for average, parameter in zip(averages, model.parameters(), strict=True):
                    average.lerp_(parameter.detach(), 0.1)
            here.wait_stream(side)
    states = (optimizer.state_dict() if handle is None else handle.optimizer_state_dict())["state"]
    state = [value for _, of in sorted(states.items()) for _, value in sorted(of.items())]
    values = [*losses, *averages, *model.parameters(), *state]
    found = [v.detach().float().cpu() for v in values if isinstance(v, Tensor)]
    if handle is not None:
        handle.detach()
    return found


def difference(mine: list[Tensor], theirs: list[Tensor], *, exact: bool) -> str | None:
    """In what two runs differ, in words; None if in nothing.

    Args:
        mine, theirs: what ``train`` gave.
        exact: they are to be equal bit by bit.
    """
    if len(mine) != len(theirs):
        return f"{len(mine)} values instead of {len(theirs)}"
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if not a.isfinite().all():
            return f"value {index} is not finite"
        if not (torch.equal(a, b) if exact else torch.allclose(a, b, rtol=2e-3, atol=2e-4)):
            close = torch.allclose(a, b, rtol=1e-5, atol=1e-6)
            off = f"value {index} is off by {float((a - b).abs().max()):.2g}"
            return f"{off}, as by rounding" if close else off
    return None
