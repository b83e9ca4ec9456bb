"""The norm of all gradients, where each rank has only its shards of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soonest.runtime import comm
from soonest.runtime.optim.sharded_state import ShardedState


def clip(
    state: ShardedState,
    gradients: Sequence[Tensor],
    max_norm: float,
    norm_type: float,
    error: bool,
    *,
    device: torch.device,
) -> Tensor:
    """Scales this rank's shards of gradients by the norm of all; a collective call.

    Args:
        state: whose ranks.
        gradients: the shards, one-dimensional, perhaps none.
        max_norm: of all gradients together, after this.
        norm_type: which norm; may be infinity.
        error: raise an error if the norm is not finite.
        device: of the gradients.

    Returns:
        The norm before, a scalar, as ``torch.nn.utils.clip_grad_norm_`` finds it.

    Raises:
        RuntimeError: the norm is not finite, and ``error`` is set.
    """
    norms = [torch.linalg.vector_norm(g, norm_type, dtype=torch.float64) for g in gradients]
    norms = norms or [torch.zeros((), dtype=torch.float64, device=device)]
    mine = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    with state.together("clipping gradients"):
        every = comm.gather_scalars(state.ranks.group, mine)
    norm = torch.linalg.vector_norm(every, norm_type)
    dtype = gradients[0].dtype if gradients else torch.float32
    norm = norm.to(torch.promote_types(dtype, torch.float32))
    if error and not torch.isfinite(norm):
        raise RuntimeError(
            f"the norm of order {norm_type} of all gradients is {norm.item()}, so they cannot "
            "be clipped"
        )
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))
    return norm
