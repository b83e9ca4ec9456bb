"""The demo's model is a GPT of about five million parameters."""

import math

import pytest
import torch

from soonest.demo.model import CONTEXT, Gpt


@pytest.fixture(scope="module")
def model() -> Gpt:
    torch.manual_seed(0)
    return Gpt()


def some_bytes(length: int = CONTEXT) -> torch.Tensor:
    return torch.randint(256, (2, length), generator=torch.Generator().manual_seed(3))


def test_it_has_about_five_million_parameters(model: Gpt):
    assert 4.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 5.5e6


def test_its_output_layer_is_its_embedding(model: Gpt):
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert shapes.count((256, 256)) == 1 + 6  # the embedding, and each block's projection
    model.zero_grad()
    unused = 7
    inputs = some_bytes()
    inputs[inputs == unused] = 8
    model(inputs, inputs).backward()
    assert model.embed.weight.grad is not None
    assert model.embed.weight.grad[unused].any(), "as an output, a byte that was never an input"


def test_it_knows_nothing_at_first(model: Gpt):
    loss = model(some_bytes(), some_bytes().flip(0)).item()
    assert loss / math.log(2) == pytest.approx(8, abs=0.2)


def test_it_does_not_look_ahead(model: Gpt):
    seen: list[torch.Tensor] = []
    hook = model.norm.register_forward_hook(lambda *given: seen.append(given[-1].detach()))
    inputs = some_bytes()
    changed = inputs.clone()
    changed[:, 50:] = 0
    model(inputs, inputs)
    model(changed, changed)
    hook.remove()
    assert torch.equal(seen[0][:, :50], seen[1][:, :50])
    assert not torch.equal(seen[0][:, 50:], seen[1][:, 50:])


def test_it_learns():
    torch.manual_seed(0)
    small = Gpt(width=32, depth=1, heads=2, context=16)
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    inputs = some_bytes(16)
    first = small(inputs, inputs).item()
    for _ in range(30):
        optimizer.zero_grad()
        small(inputs, inputs).backward()
        optimizer.step()
    assert small(inputs, inputs).item() < first / 2
