"""Solvers, rates and what goes around them, by numbers that are worked out by hand.

They hold beside the comparisons with real Caffe: what is wrong shows here in a line of arithmetic.
"""

from __future__ import annotations

import math

import pytest
import torch

from soonest.caffe.io.log import Smoothed
from soonest.caffe.proto.text import parse
from soonest.caffe.solver.rates import Rate
from soonest.caffe.solver.solvers import make
from soonest.caffe.solver.training import Trainer


def steps(solver: str, *gradients: float, start: float = 1.0, decay: float = 0.0) -> list[float]:
    """Where one weight is after each step, with these gradients."""
    weight = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    message = parse(solver, "SolverParameter")
    message.weight_decay = decay
    optimizer = make(message, [(weight, 1.0)])
    found: list[float] = []
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        found.append(weight.item())
    return found


def test_sgd():
    # h = 0.5·0 + 0.1·1 = 0.1, w = 0.9; h = 0.5·0.1 + 0.1·2 = 0.25, w = 0.65;
    # h = 0.5·0.25 + 0.1·0 = 0.125, w = 0.525.
    found = steps("base_lr: 0.1 momentum: 0.5", 1, 2, 0)
    assert found == pytest.approx([0.9, 0.65, 0.525])


def test_nesterov():
    # The step is (1 + 0.5)·h - 0.5·h of before.
    # h: 0.1, 0.25, 0.125. 1.5·0.1 - 0 = 0.15; 1.5·0.25 - 0.05 = 0.325; 1.5·0.125 - 0.125 = 0.0625.
    found = steps('type: "Nesterov" base_lr: 0.1 momentum: 0.5', 1, 2, 0)
    assert found == pytest.approx([0.85, 0.525, 0.4625])


def test_adagrad():
    # h = 9, step 0.1·3 / (3 + 1) = 0.075; h = 25, step 0.1·4 / (5 + 1) = 0.0666.
    found = steps('type: "AdaGrad" base_lr: 0.1 delta: 1', 3, 4)
    assert found == pytest.approx([0.925, 0.925 - 0.4 / 6])


def test_rmsprop():
    # h = 0.25·16 = 4 of a gradient of 4 with a decay of 0.75: step 0.1·4 / (2 + 1) = 0.1333;
    # h = 0.75·4 + 0 = 3, and no step without a gradient.
    found = steps('type: "RMSProp" base_lr: 0.1 rms_decay: 0.75 delta: 1', 4, 0, 0)
    assert found == pytest.approx([1 - 0.4 / 3] * 3)
    # h = 0.75·4 + 0.25·1 = 3.25.
    assert steps('type: "RMSProp" base_lr: 0.1 rms_decay: 0.75 delta: 1', 4, 1)[1] == (
        pytest.approx(1 - 0.4 / 3 - 0.1 / (math.sqrt(3.25) + 1))
    )


def test_adadelta():
    # first = 0.5·0 + 0.5·4 = 2; step = √((0 + 1) / (2 + 1))·2 = 1.1547; times the rate, 0.1.
    # second = 0.5·1.1547² = 0.6667. Then first = 0.5·2 + 0.5·4 = 3 and
    # step = √((0.6667 + 1) / (3 + 1))·2 = 1.2910.
    found = steps('type: "AdaDelta" base_lr: 0.1 momentum: 0.5 delta: 1', 2, 2)
    assert found == pytest.approx([1 - 0.1 * math.sqrt(4 / 3), 0.7554302], abs=1e-6)


def test_adam():
    # m = 0.5·2 = 1, v = 0.25·4 = 1: √(1 - 0.75) / (1 - 0.5) = 1, step 0.1·1 / (1 + 1) = 0.05.
    # m = 0.5·1 + 0.5·2 = 1.5, v = 0.75 + 1 = 1.75: √(1 - 0.5625) / (1 - 0.25) = 0.88192,
    # step 0.1·0.88192·1.5 / (1.32288 + 1) = 0.05695. Delta is outside of the root, uncorrected.
    found = steps('type: "Adam" base_lr: 0.1 momentum: 0.5 momentum2: 0.75 delta: 1', 2, 2)
    assert found == pytest.approx([0.95, 0.95 - 0.0569500], abs=1e-6)


def test_decay_goes_into_the_gradient_behind_clipping_and_iter_size():
    # 8 / 4 + 0.5·3 = 3.5, times 0.1 from 3: 2.65. The decay is not divided by iter_size.
    assert steps("base_lr: 0.1 iter_size: 4", 8, start=3.0, decay=0.5) == pytest.approx([2.65])
    # L1: 2 + 0.5·1 = 2.5 from 3: 2.75; from -3: 2 - 0.5 = 1.5, -3.15.
    l1 = 'base_lr: 0.1 iter_size: 4 regularization_type: "L1"'
    assert steps(l1, 8, start=3.0, decay=0.5) == pytest.approx([2.75])
    assert steps(l1, 8, start=-3.0, decay=0.5) == pytest.approx([-3.15])


RATES = {
    'lr_policy: "fixed"': {0: 2, 9: 2},
    'lr_policy: "step" gamma: 0.5 stepsize: 3': {0: 2, 2: 2, 3: 1, 5: 1, 6: 0.5},
    # A value is where the rate changes, not the iteration behind it.
    'lr_policy: "multistep" gamma: 0.5 stepvalue: 2 stepvalue: 5': {0: 2, 1: 2, 2: 1, 4: 1, 5: 0.5},
    'lr_policy: "exp" gamma: 0.5': {0: 2, 1: 1, 3: 0.25},
    # 2·(1 + 3·1)^-0.5 = 1, 2·(1 + 3·5)^-0.5 = 0.5.
    'lr_policy: "inv" gamma: 3 power: 0.5': {0: 2, 1: 1, 5: 0.5},
    # 2·(1 - 5/10)² = 0.5.
    'lr_policy: "poly" max_iter: 10 power: 2': {0: 2, 5: 0.5, 10: 0, 11: 0},
    # 2 / (1 + e^0) = 1, 2 / (1 + e^(0.5·2)) = 0.5379.
    'lr_policy: "sigmoid" gamma: -0.5 stepsize: 4': {4: 1, 6: 2 / (1 + math.e)},
    'lr_policy: "sigmoid" gamma: 0.5 stepsize: 4': {4: 1, 6: 2 / (1 + math.exp(-1))},
}


@pytest.mark.parametrize("policy", [one for one in RATES if "gamma: -" not in one])
def test_rates(policy: str):
    rate = Rate(parse(f"base_lr: 2 {policy}", "SolverParameter"))
    found = {iteration: rate.at(iteration) for iteration in range(12)}
    assert {at: found[at] for at in RATES[policy]} == pytest.approx(RATES[policy], rel=1e-6)


NET = """
base_lr: 0.1 lr_policy: "fixed" max_iter: 1 snapshot_after_train: false random_seed: 1 MORE
net_param {
  layer { name: "d" type: "DummyData" top: "x" top: "y" dummy_data_param {
    shape { dim: 2 dim: 1 } shape { dim: 2 dim: 1 }
    data_filler { value: 3 } data_filler { value: 1 } } }
  layer { name: "a" type: "InnerProduct" bottom: "x" top: "a" inner_product_param {
    num_output: 1 bias_term: false weight_filler { type: "constant" value: 2 } } }
  layer { name: "l" type: "EuclideanLoss" bottom: "a" bottom: "y" top: "l" } }
"""


def trained(more: str = "") -> tuple[Trainer, float, list[str]]:
    """After one iteration: the trainer, the weight, and what it has said."""
    said: list[str] = []
    trainer = Trainer(parse(NET.replace("MORE", more), "SolverParameter"), say=said.append)
    trainer.solve()
    return trainer, trainer.net.layers["a"].weight.item(), said


def test_an_iteration():
    # a = 2·3 = 6, 5 above y: the loss is (25 + 25) / (2·2) = 12.5, its gradient 5·3 = 15.
    trainer, weight, _ = trained()
    assert trainer.loss == pytest.approx(12.5)
    assert weight == pytest.approx(2 - 0.1 * 15)


def test_an_iteration_of_several_passes_is_their_mean():
    trainer, weight, _ = trained("iter_size: 4")
    assert trainer.loss == pytest.approx(12.5)
    assert weight == pytest.approx(2 - 0.1 * 15)


def test_gradients_are_clipped_only_if_their_norm_is_too_large():
    _, weight, said = trained("clip_gradients: 5")
    assert weight == pytest.approx(2 - 0.1 * 5)
    assert "scaling down gradients (L2 norm 15 > 5) by scale factor 0.333333" in " ".join(said)
    _, weight, said = trained("clip_gradients: 20")
    assert weight == pytest.approx(2 - 0.1 * 15)
    assert "scaling down" not in " ".join(said)


def test_rates_and_decays_of_a_blob_are_multiplied():
    # decay 0.5·0.25·2 = 0.25 into the gradient, 15.25; the rate is 0.1·3.
    source = NET.replace("MORE", "weight_decay: 0.5").replace(
        'top: "a" inner', 'top: "a" param { lr_mult: 3 decay_mult: 0.25 } inner'
    )
    trainer = Trainer(parse(source, "SolverParameter"), say=lambda line: None)
    trainer.solve()
    assert trainer.net.layers["a"].weight.item() == pytest.approx(2 - 0.3 * 15.25)


def test_the_loss_that_is_shown_is_the_mean_of_the_last_ones():
    smoothed, shown = Smoothed(3), []
    for loss in (3.0, 6.0, 9.0, 12.0, 0.0):
        smoothed.add(loss)
        shown.append(smoothed.value)
    # 3; (3 + 6) / 2; (3 + 6 + 9) / 3; (6 + 9 + 12) / 3; (9 + 12 + 0) / 3
    assert shown == pytest.approx([3.0, 4.5, 6.0, 9.0, 7.0])
