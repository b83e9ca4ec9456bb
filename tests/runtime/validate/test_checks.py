"""What is refused before anything is sent, each by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from soonest.runtime.comm import Wire
from soonest.runtime.validate import checks


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1)


def test_optimizers_must_not_share_a_parameter_however_many_there_are() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    checks.check_several(model, [sgd(layer) for layer in model])
    for several in ([model[0], model[0]], [model[0], model[1], model[0]]):
        with pytest.raises(ValueError, match=r"two optimizers hold .*'0\.(weight|bias)'"):
            checks.check_several(model, [sgd(layer) for layer in several])
    with pytest.raises(ValueError, match="no optimizer was given"):
        checks.check_several(model, [])


@pytest.mark.parametrize(
    ("buffer", "why"),
    [
        (torch.zeros(1).expand(3), r"is expanded \(shape \(3,\), strides \(0,\)\)"),
        (torch.eye(2).to_sparse(), "is torch.sparse_coo"),
        (torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8), "is quantized"),
    ],
)
def test_buffers_that_cannot_be_sent_are_refused(buffer: torch.Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=f"buffer 'x' {why}, and cannot be sent"):
        checks.check_buffer("x", buffer)


def test_other_buffers_pass() -> None:
    for buffer in (torch.zeros(2), torch.zeros(2, 3).t(), torch.zeros(()), torch.zeros(1, 0)):
        checks.check_buffer("x", buffer)


def test_wires_that_cannot_be_are_refused() -> None:
    narrow, shard = Wire(torch.bfloat16), {"shard_optimizer": True}
    checks.check_options(None, narrow, shard_optimizer=False)
    checks.check_options("shard", Wire(parameters=torch.float16), **shard)
    with pytest.raises(ValueError, match="only sent under shard_optimizer=True"):
        checks.check_options(None, Wire(parameters=torch.bfloat16), shard_optimizer=False)
    with pytest.raises(ValueError, match=r"wire_dtype is torch\.float64, but must be"):
        checks.check_options(None, Wire(torch.float64), **shard)
    with pytest.raises(ValueError, match="no method 'ring'"):
        checks.check_options("ring", Wire(), **shard)


def test_an_optimizer_must_be_the_models() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(3, 3)
    checks.check_optimizer(model, sgd(model))
    both = sgd(model, other)
    with pytest.raises(ValueError, match=r"not the model's \(group 0, number 2, shape \(3, 3\)\)"):
        checks.check_optimizer(model, both)
    checks.check_optimizer(model, both, former={id(p) for p in other.parameters()})
    with pytest.raises(ValueError, match="differentiable=False"):
        checks.check_optimizer(
            model, torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True)
        )


def test_what_cannot_be_cut_into_parts_is_refused() -> None:
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.zeros(4, 4)[:, ::2]))
    with pytest.raises(ValueError, match=r"'w' has gaps in memory \(strides \(4, 2\)\)"):
        checks.check_parts(model, ())
    checks.check_parts(model, {"w"})
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    checks.check_parts(tied, ())
    tied[1].weight.data = tied[0].weight.data
    with pytest.raises(ValueError, match="parameters share memory"):
        checks.check_parts(tied, ())
