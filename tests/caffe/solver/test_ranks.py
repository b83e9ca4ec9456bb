"""Nets on several ranks: each rank is a Caffe of its own, and gradients are averaged."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist

from helpers.ranks import run_ranks
from soonest.caffe.proto.text import parse
from soonest.caffe.solver.training import Trainer

SOLVER = """
base_lr: 0.1 lr_policy: "fixed" momentum: 0.9 weight_decay: 0.01 iter_size: 2 random_seed: 5
clip_gradients: 3 max_iter: 4 snapshot_after_train: false display: 3 debug_info: true
net_param {{ {net} }}
"""
TABLE = """
layer { name: "h" type: "HDF5Data" top: "x" top: "y" top: "cont" top: "pick" top: "order"
  hdf5_data_param { source: "list" batch_size: 6 } }
"""
SCORES = """
layer { name: "s" type: "InnerProduct" bottom: "BOTTOM" top: "s" inner_product_param {
  num_output: 3 axis: AXIS weight_filler { type: "xavier" } } }
"""


def scores(bottom: str, axis: int = 1) -> str:
    return SCORES.replace("BOTTOM", bottom).replace("AXIS", str(axis))


def unused(*names: str) -> str:
    bottoms = " ".join(f'bottom: "{name}"' for name in names)
    return f'layer {{ name: "unused" type: "Silence" {bottoms} }}\n'


RECURRENT = """
recurrent_param { num_output: 5 weight_filler { type: "uniform" min: -0.3 max: 0.3 } }
"""
LOSS = 'layer { name: "l" type: "SoftmaxWithLoss" bottom: "s" bottom: "y" top: "l" AXIS }'
CONV = """convolution_param { num_output: 3 kernel_size: 3 pad: 1
  weight_filler { type: "xavier" } }"""
NETS = {
    "lstm and rnn": TABLE
    + f'layer {{ name: "a" type: "LSTM" bottom: "x" bottom: "cont" top: "a" {RECURRENT} }}\n'
    f'layer {{ name: "b" type: "RNN" bottom: "a" bottom: "cont" top: "b" {RECURRENT} }}\n'
    + scores("b", 2)
    + LOSS.replace("AXIS", "softmax_param { axis: 2 }")
    + unused("pick", "order"),
    "statistics of each rank": TABLE
    + 'layer { name: "row" type: "Flatten" bottom: "x" top: "row" }\n'
    'layer { name: "norm" type: "BatchNorm" bottom: "row" top: "row" }\n'
    'layer { name: "gain" type: "Scale" bottom: "row" top: "row" '
    "scale_param { bias_term: true } }\n"
    + scores("row")
    + 'layer { name: "e" type: "Slice" bottom: "y" top: "one" top: "two" }\n'
    'layer { name: "l" type: "SoftmaxWithLoss" bottom: "s" bottom: "one" top: "l" }\n'
    + unused("two", "cont", "pick", "order"),
    "layers that pick": TABLE
    + 'layer { name: "row" type: "Flatten" bottom: "x" top: "row" }\n'
    + 'layer { name: "p" type: "Parameter" top: "p" parameter_param { shape { dim: 8 } } }\n'
    'layer { name: "add" type: "Bias" bottom: "row" bottom: "p" top: "add" }\n'
    + scores("add")
    + 'layer { name: "e" type: "Slice" bottom: "y" top: "one" top: "two" }\n'
    'layer { name: "f" type: "Filter" bottom: "s" bottom: "one" bottom: "pick" top: "fs" top: "fy" '
    "propagate_down: [true, false, false] }\n"
    'layer { name: "l" type: "InfogainLoss" bottom: "fs" bottom: "fy" bottom: "matrix" top: "l" }\n'
    'layer { name: "m" type: "DummyData" top: "matrix" dummy_data_param { '
    "shape { dim: 1 dim: 1 dim: 3 dim: 3 } data_filler { value: 0.5 } } }\n"
    'layer { name: "r" type: "BatchReindex" bottom: "s" bottom: "order" top: "rs" }\n'
    'layer { name: "q" type: "Reduction" bottom: "rs" top: "q" loss_weight: 0.1 '
    "reduction_param { operation: SUMSQ } }\n" + unused("two", "cont"),
    "images of several sizes": """
layer { name: "d" type: "ImageData" top: "x" top: "y" image_data_param { source: "images"
  batch_size: 1 } transform_param { scale: 0.01 } }
layer { name: "c" type: "Convolution" bottom: "x" top: "c" """
    + CONV
    + """ }
layer { name: "p" type: "Pooling" bottom: "c" top: "p" pooling_param { kernel_size: 2 stride: 2 } }
layer { name: "up" type: "Deconvolution" bottom: "p" top: "up" convolution_param { num_output: 2
  kernel_size: 4 stride: 2 pad: 1 weight_filler { type: "xavier" } } }
layer { name: "cut" type: "Crop" bottom: "up" bottom: "x" top: "cut" }
layer { name: "spp" type: "SPP" bottom: "cut" top: "spp" spp_param { pyramid_height: 2 } }
"""
    + scores("spp")
    + LOSS.replace("AXIS", ""),
}
NETS["layers that pick"] = "".join(
    sorted(NETS["layers that pick"].splitlines(keepends=True), key=lambda line: '"m"' not in line)
)
KEPT = {"statistics of each rank": "norm"}
"""Of a net, the layer whose blobs are of each rank."""


def make_data(folder: Path) -> None:
    """Rows of eight values and two labels, and images no two of which have one size."""
    random = np.random.default_rng(4)
    rows = 50  # Which neither a batch nor the ranks divide.
    with h5py.File(folder / "rows.h5", "w") as file:
        file["x"] = random.random((rows, 2, 4), dtype=np.float32)
        file["y"] = random.integers(0, 3, (rows, 2)).astype(np.float32)
        file["cont"] = (random.random((rows, 2)) > 0.2).astype(np.float32)
        file["pick"] = (random.random(rows) > 0.5).astype(np.float32)
        file["order"] = random.integers(0, 6, rows).astype(np.float32)
    (folder / "list").write_text("rows.h5")
    lines = []
    for number in range(7):
        size = (8 + number, 12 - number % 3, 3)
        cv2.imwrite(str(folder / f"{number}.png"), random.integers(0, 256, size, dtype=np.uint8))
        lines.append(f"{number}.png {number % 3}\n")
    (folder / "images").write_text("".join(lines))


def trainer(name: str, rank: int, ranks: int) -> Trainer:
    return Trainer(
        parse(SOLVER.format(net=NETS[name]), "SolverParameter"),
        rank=rank, ranks=ranks, say=lambda line: None,
    )  # fmt: skip


def weights(made: Trainer) -> dict[str, list[np.ndarray]]:
    return {
        step.layer.spec.name: [blob.detach().numpy().copy() for blob in step.layer.blobs()]
        for step in made.net.steps
    }


def on_a_rank(folder: str) -> dict[str, dict[str, list[np.ndarray]]]:
    os.chdir(folder)
    found = {}
    for name in NETS:
        made = trainer(name, dist.get_rank(), dist.get_world_size())
        made.solve()
        assert made.handle is not None  # It is prioritized.
        found[name] = weights(made)
        made.close()
    return found


def averaged(name: str, ranks: int) -> list[dict[str, list[np.ndarray]]]:
    """What so many Caffes come to that share the mean of their gradients: the weights of each."""
    all_ = [trainer(name, rank, ranks) for rank in range(ranks)]
    blobs = [[blob.tensor for blob in made._learned] for made in all_]
    with torch.no_grad():
        for own in zip(*blobs, strict=True):
            for other in own[1:]:
                other.copy_(own[0])
    for _ in range(all_[0].solver.max_iter):
        for made in all_:
            made.optimizer.zero_grad()
            for _ in range(made.solver.iter_size):
                made._backward(made.net().loss)
        for own in zip(*blobs, strict=True):
            mean = torch.stack([blob.grad for blob in own if blob.grad is not None]).mean(0)
            for blob in own:
                blob.grad = mean.clone()
        for made in all_:
            made._update(shown=False)
            made.iteration += 1
    for made in all_:
        made.net.close()
    return [weights(made) for made in all_]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_so_many_caffes_that_share_the_mean_of_their_gradients(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = run_ranks(on_a_rank, ranks, str(tmp_path))
    for name in NETS:
        wanted = averaged(name, ranks)
        for rank in range(ranks):
            for layer, arrays in wanted[rank].items():
                for mine, theirs in zip(found[rank][name][layer], arrays, strict=True):
                    np.testing.assert_allclose(mine, theirs, atol=2e-6, err_msg=f"{name} {layer}")
        own = KEPT.get(name)
        if own:
            means = [found[rank][name][own][0] for rank in range(ranks)]
            assert not np.allclose(means[0], means[1])
