"""Signals to several ranks: all act on them, and in the same iteration, whoever got them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from helpers.ranks import run_ranks
from soonest.caffe.io import solver_state
from soonest.caffe.proto.text import parse
from soonest.caffe.solver.signals import Requests, caught
from soonest.caffe.solver.training import Trainer
from soonest.lab import Loopback

NET = """
layer { name: "d" type: "DummyData" top: "x" top: "y"
  dummy_data_param { shape { dim: 4 dim: 6 } shape { dim: 4 } data_filler { type: "gaussian" }
    data_filler { } } }
layer { name: "f" type: "InnerProduct" bottom: "x" top: "f"
  inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "l" type: "SoftmaxWithLoss" bottom: "f" bottom: "y" top: "l" }
"""
SOLVER = (
    'base_lr: 0.1 lr_policy: "fixed" momentum: 0.9 max_iter: {most} random_seed: 1 '
    'snapshot_prefix: "{prefix}" '
)
HUP, INT = signal.SIGHUP, signal.SIGINT
MOST = 14

CASES: dict[str, tuple[list[dict[int, signal.Signals]], list[int]]] = {
    "saved-by-second": ([{}, {4: HUP}], [6, MOST]),
    "saved-by-first": ([{4: HUP}, {}], [6, MOST]),
    "saved-by-both-apart": ([{4: HUP}, {9: HUP}], [6, 11, MOST]),
    "stopped-by-second": ([{}, {4: INT}], [6]),
    "stopped-by-both-apart": ([{5: INT}, {4: INT}], [6]),
    "saved-and-stopped": ([{4: HUP, 5: INT}, {4: INT, 5: HUP}], [6]),
}
"""Per rank, in which iteration it gets which signal; and where all save, the last time at the end.

What one is asked in an iteration, all know after the next."""


def solve(folder: str) -> list[tuple[list[int], int]]:
    """Per case, in which iterations this rank saved, or would have, and when it stopped."""
    os.chdir(folder)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: list[tuple[list[int], int]] = []
    for name, (sent, _) in CASES.items():
        source = SOLVER.format(most=MOST, prefix=name) + f"net_param {{ {NET} }}"
        requests = Requests(ranks)
        trainer = Trainer(
            parse(source, "SolverParameter"),
            rank=rank, ranks=ranks, say=lambda line: None, requests=requests,
        )  # fmt: skip
        forward, save = trainer.net.forward, trainer.save
        saved: list[int] = []

        def signalled(
            trainer: Any = trainer, sent: Any = sent[rank], forward: Any = forward, **how: Any
        ) -> Any:
            if trainer.iteration in sent:
                os.kill(os.getpid(), sent[trainer.iteration])
            return forward(**how)

        def noted(trainer: Any = trainer, saved: Any = saved, save: Any = save) -> None:
            saved.append(trainer.iteration)
            save()

        trainer.net.forward = signalled  # type: ignore[method-assign]
        trainer.save = noted  # type: ignore[method-assign]
        with caught(requests, sigint="stop", sighup="snapshot"), contextlib.closing(trainer):
            trainer.solve()
        found.append((saved, trainer.iteration))
    return found


def test_ranks_save_and_stop_in_the_same_iteration_whoever_got_the_signal(tmp_path: Path):
    first, second = run_ranks(solve, 2, str(tmp_path))
    wanted = [(saved, saved[-1]) for _, saved in CASES.values()]
    assert first == second == wanted
    for name, (_, saved) in CASES.items():
        files = [tmp_path / f"{name}_iter_{iteration}.solverstate" for iteration in saved]
        assert [solver_state.read(file).iteration for file in files] == saved
        assert len(list(tmp_path.glob(f"{name}_iter_*.solverstate"))) == len(saved)


def test_a_command_on_two_ranks_saves_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(NET)
    solver = SOLVER.format(most=1_000_000_000, prefix="run")
    Path("solver.prototxt").write_text(f'net: "net.prototxt" display: 1 {solver}')
    pids: list[int] = []
    lines: list[str] = []
    stages = [
        ("Iteration ", lambda: os.kill(pids[1], HUP)),
        ("Snapshotting solver state", lambda: os.kill(os.getpid(), INT)),
        ("Optimization stopped early.", lambda: None),
    ]

    def on_line(rank: int, line: str) -> None:
        if line.startswith("pid "):
            pids[rank:rank] = [int(line.split()[1])]
        said = line.partition("] ")[2]
        if len(pids) == 2 and stages and said.startswith(stages[0][0]):
            lines.append(said)
            stages.pop(0)[1]()

    program = (
        "import os; print('pid', os.getpid(), flush=True); from soonest.cli import main; "
        "raise SystemExit(main(['caffe', 'train', '--solver=solver.prototxt']))"
    )
    command = [sys.executable, "-c", program]
    code = Loopback(2).run(command, on_line=on_line, passed_on=(INT,), timeout_s=120)
    assert code == 0
    assert not stages
    saved = {solver_state.read(file).iteration for file in tmp_path.glob("run_iter_*.solverstate")}
    assert len(saved) == 2


def test_a_second_interrupt_finds_nothing_to_interrupt(tmp_path: Path):
    (tmp_path / "net.prototxt").write_text(NET)
    solver = SOLVER.format(most=1_000_000_000, prefix="run")
    (tmp_path / "solver.prototxt").write_text(f'net: "net.prototxt" display: 1 {solver}')
    words = [sys.executable, "-m", "soonest", "caffe", "train", "--solver=solver.prototxt"]
    running = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    while "Iteration " not in running.stderr.readline():
        assert running.poll() is None
    for _ in range(40):
        running.send_signal(INT)
        time.sleep(0.1)
        if running.poll() is not None:
            break
    said = running.stderr.read()
    running.stderr.close()
    assert running.wait(60) == 0
    assert said.splitlines()[-1].endswith("Optimization Done.")
    (saved,) = tmp_path.glob("run_iter_*.solverstate")
    assert solver_state.read(saved).iteration > 0
