"""Under torchrun, a lost rank costs the steps since the last checkpoint and nothing else."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import soonest
from helpers.equal import equal
from helpers.ranks import run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "restart.py"
STEPS, EVERY = 26, 6
KILLS = {7: 1, 15: 0, 23: 1}
"""After which step which rank is killed: when one checkpoint is perhaps not whole, and later."""
LIMIT_S = 120


def launch(folder: Path, cache: Path, *more: str, kills: dict[int, int]) -> list[str]:
    """What the example says on two ranks under torchrun, of which some are killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--max-restarts=3", EXAMPLE, f"--folder={folder}", f"--steps={STEPS}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SOONEST_CACHE": str(cache)}
    left, said = dict(kills), []
    with subprocess.Popen(
        [*command, *options, f"--every={EVERY}", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    ) as launcher:
        limit = threading.Timer(LIMIT_S, launcher.kill)
        limit.start()
        assert launcher.stdout is not None
        for line in launcher.stdout:
            said.append(line.rstrip())
            step = re.match(r"step (\d+): ", line)
            if step and (rank := left.pop(int(step[1]), None)) is not None:
                os.kill(workers(launcher.pid)[rank], signal.SIGKILL)
        limit.cancel()
    assert launcher.returncode == 0, "\n".join(said)
    assert not left
    return said


def workers(launcher: int) -> dict[int, int]:
    """The processes of the ranks, by rank."""
    found: dict[int, int] = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(v[5:]): int(child) for v in variables if v.startswith(b"RANK=")}
    return found


def content(folder: Path, step: int = STEPS) -> dict[str, Any]:
    """Of a checkpoint."""
    file = folder / "whole.pt"
    dcp_to_torch_save(folder / f"step-{step:06}", file)
    return torch.load(file, weights_only=False)


class Killed(NamedTuple):
    """A run whose ranks were killed three times: its checkpoints, whether sharded, its words."""

    folder: Path
    shard: bool
    said: list[str]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Checkpoints of a run that nobody has disturbed."""
    folder = tmp_path_factory.mktemp("quiet")
    launch(folder, cache, kills={})
    return folder


@pytest.fixture(scope="module", params=["plain", "sharded"])
def killed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Killed:
    folder, shard = tmp_path_factory.mktemp("killed"), request.param == "sharded"
    said = launch(folder, cache, *["--shard"] * shard, kills=KILLS)
    return Killed(folder, shard, said)


def test_killed_three_times_training_ends_as_if_nothing_had_happened(
    killed: Killed, quiet: Path
) -> None:
    expected = content(quiet)
    moments = expected["training"]["optim"]["state"]["embed.weight"]
    assert moments["step"] == STEPS
    assert moments["exp_avg"].any()
    assert expected["order"] == {"trained_on": STEPS * 2 * 4}
    assert equal(content(killed.folder), expected)


def test_each_loss_costs_the_steps_since_the_last_checkpoint(killed: Killed) -> None:
    starts = [
        int(found[1]) for line in killed.said if (found := re.match(r".* after (\d+) s", line))
    ]
    assert starts[0] == 0
    assert len(starts) == 1 + len(KILLS)
    for killed_after, begin in zip(KILLS, starts[1:], strict=True):
        assert begin % EVERY == 0
        # The newest may not have been whole yet, but the one before it was.
        assert killed_after - 2 * EVERY <= begin <= killed_after + 1


def example() -> Any:
    spec = importlib.util.spec_from_file_location("example_of_restart", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def goes_on(folder: Path, shard: bool, steps: int) -> tuple[int, Any, Any]:
    """Takes over the newest checkpoint, trains on for some steps, and saves.

    Returns:
        After how many steps it was taken, and model and optimizer then and at the end.
    """
    given = example()
    torch.manual_seed(1)
    model = given.Gpt(**given.SIZE)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    handle = soonest.prioritize(model, optimizer, shard_optimizer=shard)
    order = given.Order(1000)
    parts = {"training": handle, "schedule": schedule, "order": order}
    checkpoints = given.Checkpoints(folder, parts)
    begin = checkpoints.load()
    then = copied(handle.state_dict())
    for _ in range(steps):
        optimizer.zero_grad()
        codes = torch.randint(256, (2, 17))
        model(codes[:, :-1], codes[:, 1:]).backward()
        optimizer.step()
        schedule.step()
    if steps:
        checkpoints.save(begin + steps)
    checkpoints.finish()
    return begin, then, copied(handle.state_dict())


def copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return tree.detach().clone() if isinstance(tree, torch.Tensor) else tree


def test_another_number_of_ranks_goes_on_with_the_same_state(
    killed: Killed, tmp_path: Path
) -> None:
    """From two to three and back; there, state that was whole is shared out, and the reverse."""
    shard = not killed.shard
    folder = Path(shutil.copytree(killed.folder, tmp_path / "checkpoints"))
    saved = content(folder)["training"]
    trained = None
    for begin, then, trained in run_ranks(goes_on, 3, folder, shard, 2):
        assert begin == STEPS
        assert equal(then, saved)
        assert not equal(trained, saved)
    for begin, then, _ in run_ranks(goes_on, 2, folder, not shard, 0):
        assert begin == STEPS + 2
        assert equal(then, trained)


def test_a_checkpoint_that_is_not_whole_is_passed_over(quiet: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quiet, tmp_path / "checkpoints"))
    whole = sorted(path.name for path in folder.glob("step-*"))
    assert whole == [f"step-{step:06}" for step in (STEPS // EVERY * EVERY, STEPS)]
    (folder / whole[-1] / ".metadata").unlink()
    for begin, then, _ in run_ranks(goes_on, 2, folder, False, 0):
        assert begin == STEPS // EVERY * EVERY
        assert equal(then, content(folder, begin)["training"])


def test_the_order_of_samples_is_one_for_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = example()

    def drawn(ranks: int, trained_on: int, batches: int) -> list[int]:
        """What all ranks get, in one row."""
        monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
        every = []
        for rank in range(ranks):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            order = given.Order(10)
            order.load_state_dict({"trained_on": trained_on})
            iterator = iter(order)
            every.append([sample for _ in range(batches) for sample in next(iterator)])
        return [sample for together in zip(*every, strict=True) for sample in together]

    alone = drawn(1, 0, 18)
    assert len(alone) == 72
    assert all(sorted(alone[at : at + 10]) == list(range(10)) for at in range(0, 70, 10))
    assert alone[:10] != alone[10:20]
    for ranks in (2, 3):
        assert drawn(ranks, 0, 6) == alone[: 24 * ranks]
        assert drawn(ranks, 24, 4) == alone[24 : 24 + 16 * ranks]
