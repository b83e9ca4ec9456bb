"""Scores a net, as ``caffe test`` does."""

from __future__ import annotations

import torch
from torch import Tensor

from soonest.caffe.debug import Watch
from soonest.caffe.log import Say
from soonest.caffe.net import Net


@torch.no_grad()
def score(net: Net, batches: int, *, say: Say) -> None:
    """Runs a net on so many batches and says each result and the means.

    Args:
        net: to test.
        batches: how many.
        say: what log lines go to.
    """
    say(f"Running for {batches} iterations.")
    total = 0.0
    sums: dict[str, Tensor] = {}
    for batch in range(batches):
        result = net(watch=Watch(net, say) if net.definition.debug_info else None)
        total += result.loss.item()
        for name, blob in result.outputs.items():
            sums[name] = sums[name] + blob if name in sums else blob.clone()
            for value in blob.flatten().tolist():
                say(f"Batch {batch}, {name} = {value:g}")
    say(f"Loss: {total / batches:g}")
    for name, blob in sums.items():
        weight = net.loss_weight(name)
        for value in (blob / batches).flatten().tolist():
            loss = f" (* {weight:g} = {weight * value:g} loss)" if weight else ""
            say(f"{name} = {value:g}{loss}")
