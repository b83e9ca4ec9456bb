"""``torch.distributed.checkpoint``: to and from plain PyTorch, at any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import soonest
from helpers.equal import equal
from helpers.ranks import run_ranks
from helpers.shards import build, train

ARMS = ("ddp", "soonest", "sharded")


def start(arm: str) -> tuple[Any, Any, Any, Any]:
    """Model, optimizer, what is trained, and the handle."""
    model, optimizer = build()
    if arm == "ddp":
        return model, optimizer, DistributedDataParallel(model), None
    handle = soonest.prioritize(
        model,
        optimizer,
        shard_optimizer=arm in ("sharded", "rounded"),
        parameter_wire_dtype=torch.bfloat16 if arm == "rounded" else None,
    )
    return model, optimizer, model, handle


def result(model: Any, optimizer: Any, handle: Any) -> tuple[Any, Any]:
    state = handle.optimizer_state_dict() if handle else optimizer.state_dict()
    return {name: value.clone() for name, value in model.state_dict().items()}, state


def saves(arm: str, folder: str, steps: int) -> tuple[Any, Any]:
    model, optimizer, net, handle = start(arm)
    train(net, optimizer, range(steps))
    if handle:
        dcp.save({"training": handle}, checkpoint_id=folder)
    else:
        of_model, of_optimizer = get_state_dict(net, optimizer)
        dcp.save({"training": {"model": of_model, "optim": of_optimizer}}, checkpoint_id=folder)
    return result(model, optimizer, handle)


def loads(arm: str, folder: str, steps: range) -> tuple[Any, Any]:
    model, optimizer, net, handle = start(arm)
    train(net, optimizer, range(20, 20 + steps.start // 4))  # something to overwrite, or nothing
    if handle:
        dcp.load({"training": handle}, checkpoint_id=folder)
    else:
        of_model, of_optimizer = get_state_dict(net, optimizer)
        form = {"model": of_model, "optim": of_optimizer}
        dcp.load({"training": form}, checkpoint_id=folder)
        set_state_dict(
            net, optimizer, model_state_dict=form["model"], optim_state_dict=form["optim"]
        )
    train(net, optimizer, steps)
    return result(model, optimizer, handle)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    """By arm, a checkpoint of three ranks and what is in it."""
    folders = {arm: str(tmp_path_factory.mktemp(arm)) for arm in ARMS}
    return {arm: (at, run_ranks(saves, 3, arm, at, 4)[0]) for arm, at in folders.items()}


@pytest.mark.parametrize("to", ARMS)
@pytest.mark.parametrize("of", ARMS)
def test_a_checkpoint_goes_anywhere(of: str, to: str, saved: dict[str, tuple[str, Any]]) -> None:
    folder, content = saved[of]
    for loaded in run_ranks(loads, 1 if to == "ddp" else 4, to, folder, range(0)):
        assert equal(list(loaded), list(content))


@pytest.mark.parametrize("arm", [*ARMS, "rounded"])
def test_a_run_goes_on_bit_by_bit(arm: str, tmp_path: Path) -> None:
    whole = run_ranks(saves, 2, arm, str(tmp_path / "whole"), 9)[0]
    run_ranks(saves, 2, arm, str(tmp_path / "half"), 4)
    resumed = run_ranks(loads, 2, arm, str(tmp_path / "half"), range(4, 9))[0]
    assert equal(list(resumed), list(whole))


def test_what_is_saved_is_exact_where_the_model_is_rounded(tmp_path: Path) -> None:
    rounded, state = run_ranks(saves, 3, "rounded", str(tmp_path), 4)[0]
    for loaded, loaded_state in run_ranks(loads, 1, "ddp", str(tmp_path), range(0)):
        assert equal(loaded_state, state)
        for name, value in loaded.items():
            assert not torch.equal(value, rounded[name])
            assert torch.equal(value.bfloat16().float(), rounded[name])


def with_torchs_own() -> bool:
    """Without the handle, where every rank has all state."""
    model, optimizer, net, handle = start("soonest")
    train(net, optimizer, range(3))
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return equal(dict(handle.state_dict()), {"model": of_model, "optim": of_optimizer})


def test_torchs_own_functions_give_the_same() -> None:
    assert run_ranks(with_torchs_own, 2) == [True, True]


def refuses() -> str:
    _, _, _, handle = start("soonest")
    with pytest.raises(ValueError) as refused:
        handle.load_state_dict({"model": {}})
    dist.barrier()
    return str(refused.value)


def test_half_a_state_is_refused() -> None:
    for said in run_ranks(refuses, 2):
        assert said.startswith("the state has no 'optim' (only 'model')")


def test_the_checkpoint_of_a_group_of_one(tmp_path: Path) -> None:
    saved = run_ranks(saves, 1, "sharded", str(tmp_path), 3)[0]
    assert equal(run_ranks(loads, 2, "sharded", str(tmp_path), range(0))[0][0], saved[0])
    assert torch.is_tensor(saved[0]["0.weight"])
