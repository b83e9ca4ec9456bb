"""A small model with two parameter groups, and its training loop, for tests of sharded state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soonest.runtime.handle import Handle


def build(seed: int = 0) -> tuple[nn.Sequential, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 130), nn.ReLU(), nn.Linear(130, 90), nn.Linear(90, 3))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def inputs(step: int) -> Tensor:
    noise = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(4, 12, generator=noise)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, **clip: Any) -> None:
    handle: Handle | None = clip.pop("handle", None)
    for step in steps:
        optimizer.zero_grad()
        model(inputs(step)).square().mean().backward()
        if handle:
            handle.clip_grad_norm_(**clip)
        elif clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), **clip)
        optimizer.step()
