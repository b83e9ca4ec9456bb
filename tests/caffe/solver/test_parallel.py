"""Several ranks: together they are one Caffe with the batch of them all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch.distributed as dist

from helpers import golden_caffe as golden
from helpers.ranks import run_ranks
from soonest.caffe.io import prototxt, solver_state
from soonest.caffe.proto.text import parse
from soonest.caffe.solver.training import Trainer

CASES = [("dp4_adam", False), ("dp4_sgd_clip_iter2", True)]
"""Of each, whether to read the solver of the large batch and divide that."""
RANKS = 4


def train(folder: str, prefix: str) -> list[list[float]]:
    """Trains each case on this rank and returns its losses, pass by pass."""
    found: list[list[float]] = []
    for name, divide in CASES:
        os.chdir(Path(folder) / "solvers" / name)
        solver = prototxt.read_solver("reference/solver.prototxt" if divide else "solver.prototxt")
        solver.snapshot_prefix = f"{prefix}/{name}"
        rank = dist.get_rank()
        lines: list[str] = []
        trainer = Trainer(
            solver, rank=rank, ranks=dist.get_world_size(), divide=divide, say=lines.append
        )
        trainer.finetune(["init.caffemodel"])
        losses: list[float] = []
        forward = trainer.net.forward

        def watched(forward: Any = forward, losses: Any = losses, **how: Any) -> Any:
            result = forward(**how)
            losses.append(result.loss.item())
            return result

        trainer.net.forward = watched  # type: ignore[method-assign]
        trainer.solve()
        trainer.close()
        assert bool(lines) == (rank == 0)
        assert len(trainer.tests) == (1 if rank == 0 else 0)
        found.append(losses)
    return found


def test_ranks_together_are_one_caffe_with_the_batch_of_them_all(tmp_path: Path):
    found = run_ranks(train, RANKS, str(golden.FOLDER), str(tmp_path))
    for number, (name, _) in enumerate(CASES):
        folder = golden.FOLDER / "solvers" / name
        prefix = tmp_path / name
        for iteration in (10, 20):
            golden.compare(folder, f"snap_iter_{iteration}", prefix, iteration, "")
        wanted = json.loads((folder / "expected" / "losses.json").read_text(encoding="utf-8"))
        for rank in range(RANKS):
            theirs = np.array(wanted["rank_losses"][rank]).flatten()
            losses = found[rank][number][: len(theirs)]
            np.testing.assert_allclose(losses, theirs, rtol=1e-5)


SOLVER = """
base_lr: 0.1 lr_policy: "step" gamma: 0.5 stepsize: 2 momentum: 0.9 weight_decay: 0.01
type: "Nesterov" clip_gradients: 0.5 iter_size: 2 random_seed: 3
max_iter: {most} snapshot_prefix: "{prefix}"
net_param {{
  layer {{ name: "h" type: "HDF5Data" top: "x" top: "y"
    hdf5_data_param {{ source: "list" batch_size: {batch} }} }}
  layer {{ name: "a" type: "InnerProduct" bottom: "x" top: "a"
    inner_product_param {{ num_output: 8 weight_filler {{ type: "xavier" }} }} }}
  layer {{ name: "r" type: "ReLU" bottom: "a" top: "a" }}
  layer {{ name: "b" type: "InnerProduct" bottom: "a" top: "b"
    inner_product_param {{ num_output: 3 weight_filler {{ type: "xavier" }} }} }}
  layer {{ name: "idle" type: "InnerProduct" bottom: "a" top: "idle"
    inner_product_param {{ num_output: 2 weight_filler {{ type: "xavier" }} }} }}
  layer {{ name: "s" type: "Silence" bottom: "idle" }}
  layer {{ name: "l" type: "SoftmaxWithLoss" bottom: "b" bottom: "y" top: "l" }} }}
"""
ARMS = {"each": (4, False), "divided": (8, True)}
"""The batch in the net, and whether it is that of both ranks."""


def train_and_go_on(
    folder: str, prefix: str, batch: int, *, divide: bool = False, rank: int = 0, ranks: int = 1
) -> list[np.ndarray]:
    """Trains 3 iterations, goes on from the state that was saved, and returns the weights."""
    os.chdir(folder)
    for most in (3, 5):
        source = SOLVER.format(most=most, prefix=prefix, batch=batch)
        trainer = Trainer(
            parse(source, "SolverParameter"),
            rank=rank, ranks=ranks, divide=divide, say=lambda line: None,
        )  # fmt: skip
        if most > 3:
            trainer.resume(f"{prefix}_iter_3.solverstate")
        trainer.solve()
        trainer.close()
        if ranks > 1:
            dist.barrier()  # The first has saved before another goes on.
    return [blob.tensor.detach().numpy().copy() for blob in trainer.net.stored]


def on_a_rank(folder: str) -> list[list[np.ndarray]]:
    place = {"rank": dist.get_rank(), "ranks": dist.get_world_size()}
    return [
        train_and_go_on(folder, name, batch, divide=divide, **place)
        for name, (batch, divide) in ARMS.items()
    ]


def test_two_ranks_are_one_process_with_twice_the_batch_also_when_they_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    random = np.random.default_rng(2)
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["x"] = random.random((37, 5), dtype=np.float32)
        file["y"] = random.integers(0, 3, 37).astype(np.float32)
    (tmp_path / "list").write_text("rows.h5")
    monkeypatch.chdir(tmp_path)
    wanted = train_and_go_on(str(tmp_path), "one", 8)
    for found in run_ranks(on_a_rank, 2, str(tmp_path)):
        for blobs in found:
            for mine, theirs in zip(blobs, wanted, strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-6)
    histories = {
        name: solver_state.read(f"{name}_iter_5.solverstate").history for name in (*ARMS, "one")
    }
    for name in ARMS:
        for mine, theirs in zip(histories[name], histories["one"], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-6)
