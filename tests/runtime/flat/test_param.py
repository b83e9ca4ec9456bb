"""Where parameters and their gradients lie."""

from __future__ import annotations

import torch
from torch import nn

from soonest.runtime.flat.buffers import FlatBuffers, trainable
from soonest.runtime.flat.storage import overlap


def test_a_frozen_parameter_takes_its_gradient_along_to_another_plan() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = FlatBuffers(model)
    for param in before.params:
        param.parameter.grad = param.grad
        param.raw_grad.fill_(1.0 + param.order)
    frozen = model[0].weight
    frozen.requires_grad_(False)
    kept = frozen.grad
    after = before.in_order(["1.weight", "1.bias", "0.weight", "0.bias"])
    assert [p.name for p in after.params] == ["1.weight", "1.bias", "0.weight", "0.bias"]
    assert frozen.grad is kept, "it is still the user's own object"
    assert kept is not None
    assert kept.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    by_name = {p.name: p for p in after.params}
    assert kept.data_ptr() == by_name["0.weight"].raw_grad.data_ptr(), "in the new buffers"
    assert [float(by_name[name].raw_grad.flatten()[0]) for name in by_name] == [3.0, 4.0, 1.0, 2.0]


def test_parameters_that_are_gone_or_frozen_from_the_start_have_no_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.requires_grad_(False)
    layout = FlatBuffers(model)
    assert [p.name for p in layout.params] == ["0.weight", "0.bias", "1.bias"]
    model[1].weight.requires_grad_(True)
    assert [p.name for p in layout.grown().params] == ["0.weight", "0.bias", "1.bias", "1.weight"]


def test_a_shared_parameter_belongs_to_the_first_of_its_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert [(name, layer) for name, layer, _ in trainable(model)] == [
        ("0.weight", "0"), ("0.bias", "0"),
    ]  # fmt: skip


def test_complex_parameters_take_the_room_of_two() -> None:
    model = nn.Module()
    model.register_parameter("z", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    layout = FlatBuffers(model)
    (slot,) = layout.flats[0].slots
    assert (layout.flats[0].dtype, slot.numel) == ("float32", 6)
    assert layout.params[0].grad.dtype == torch.complex64


def test_what_lies_beside_each_other_does_not_overlap() -> None:
    memory = torch.zeros(10)
    assert not overlap([memory[:5], memory[5:]])
    assert overlap([memory[:5], memory[4:]])
    assert overlap([memory[::2], memory[1:4]])


def test_memory_of_another_order_is_noticed() -> None:
    layout = FlatBuffers(nn.Conv2d(2, 2, 2))
    weight = layout.params[0]
    assert not weight.has_moved
    here = weight.parameter.data
    weight.parameter.data = here.as_strided(here.shape, (1, 2, 4, 8))
    assert weight.parameter.data.data_ptr() == here.data_ptr()
    assert weight.has_moved
