"""Several ranks: together they are one Caffe with the batch of them all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import golden_caffe as golden
from ranks import run_ranks
from soonest.caffe import definition
from soonest.caffe.training import Trainer

CASES = [("dp4_adam", False), ("dp4_sgd_clip_iter2", True)]
"""Of each, whether to read the solver of the large batch and divide that."""
RANKS = 4


def train(folder: str, prefix: str) -> list[list[float]]:
    """Trains each case on this rank and returns its losses, pass by pass."""
    found: list[list[float]] = []
    for name, divide in CASES:
        os.chdir(Path(folder) / "solvers" / name)
        solver = definition.read_solver(
            "reference/solver.prototxt" if divide else "solver.prototxt"
        )
        solver.snapshot_prefix = f"{prefix}/{name}"
        rank = dist.get_rank()
        lines: list[str] = []
        trainer = Trainer(
            solver, rank=rank, ranks=dist.get_world_size(), divide=divide, say=lines.append
        )
        trainer.finetune(["init.caffemodel"])
        losses: list[float] = []
        forward = trainer.net.forward

        def watched(*arguments: Any, forward: Any = forward, losses: Any = losses) -> Any:
            result = forward(*arguments)
            losses.append(result.loss.item())
            return result

        trainer.net.forward = watched  # type: ignore[method-assign]
        trainer.solve()
        trainer.close()
        assert bool(lines) == (rank == 0)
        assert len(trainer.tests) == (1 if rank == 0 else 0)
        found.append(losses)
    return found


@golden.needed
def test_ranks_together_are_one_caffe_with_the_batch_of_them_all(tmp_path: Path):
    pytest.importorskip("lmdb")
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
