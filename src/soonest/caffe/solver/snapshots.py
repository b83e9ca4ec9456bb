"""Saves what a solver has come to, and goes on from there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from soonest.caffe.io import solver_state, weights
from soonest.caffe.io.log import Say
from soonest.caffe.layers.base import gradient
from soonest.caffe.net.net import Net
from soonest.caffe.net.trained import copy_weights
from soonest.caffe.proto.message import Message
from soonest.caffe.solver.solvers import CaffeSolver


def check_prefix(solver: Message) -> None:
    """Finds out now that nothing can be saved, not after hours of training.

    Raises:
        ValueError: files cannot be written where the solver says.
    """
    prefix = Path(solver.snapshot_prefix)
    if not os.access(prefix.parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"cannot write to snapshot_prefix {str(prefix)!r}: make sure that the folder "
            f"{prefix.parent} exists and is writable"
        )


def save(
    solver: Message, net: Net, optimizer: CaffeSolver, iteration: int, step: int, say: Say
) -> None:
    """Writes weights and state.

    Args:
        solver: says where and in which format.
        net: with the weights.
        optimizer: with the histories.
        iteration: how many are done.
        step: how many steps the rate has taken.
        say: what is told about it.

    Raises:
        ValueError: it cannot be written.
    """
    hdf5 = solver.snapshot_format == "HDF5"
    ending, kind = (".h5", "HDF5") if hdf5 else ("", "binary proto")
    stem = f"{solver.snapshot_prefix}_iter_{iteration}"
    model, saved = f"{stem}.caffemodel{ending}", f"{stem}.solverstate{ending}"
    say(f"Snapshotting to {kind} file {model}")
    if hdf5:
        weights.write_hdf5(model, *tables(net, with_diff=solver.snapshot_diff))
    else:
        weights.write_message(model, net.to_message(with_diff=solver.snapshot_diff))
    say(f"Snapshotting solver state to {kind} file {saved}")
    solver_state.State(iteration, model, histories(net, optimizer), step).write(saved)


def tables(net: Net, *, with_diff: bool) -> tuple[weights.Weights, weights.Weights | None]:
    """The blobs of each layer, shared ones only in the first that has them."""
    shared = {(layer, name) for blob in net.stored for layer, name in blob.also}
    data: weights.Weights = {}
    diff: weights.Weights = {}
    for one in net.steps:
        own, name = one.layer, one.layer.spec.name
        if name in data:  # Its name is that of another, whose weights are those that are read.
            continue
        data[name], diff[name] = {}, {}
        for number, attribute in enumerate(own.blob_names):
            if (own, attribute) not in shared:
                tensor = getattr(own, attribute)
                data[name][number] = tensor.detach().numpy()
                found = gradient(tensor)
                diff[name][number] = (torch.zeros_like(tensor) if found is None else found).numpy()
    return data, diff if with_diff else None


def histories(net: Net, optimizer: CaffeSolver) -> list[np.ndarray]:
    """What the optimizer remembers of every blob; zeros of those that it does not move."""
    found: list[np.ndarray] = []
    known = optimizer.state
    for name in optimizer.history_names():
        for blob in net.stored:
            kept = known.get(blob.tensor, {}).get(name)
            found.append(np.zeros(tuple(blob.tensor.shape), np.float32) if kept is None
                         else kept.detach().numpy())  # fmt: skip
    return found


def restore(path: str, net: Net, optimizer: CaffeSolver) -> solver_state.State:
    """Takes over weights and histories.

    Args:
        path: of the state; the weights are where it says, or else beside it.
        net: gets the weights.
        optimizer: gets the histories; it must not be prioritized yet.

    Returns:
        The state.

    Raises:
        ValueError: they are not there, or do not fit.
    """
    found = solver_state.read(path)
    names = optimizer.history_names()
    if len(found.history) != len(names) * len(net.stored):
        raise ValueError(
            f"{path} has {len(found.history)} histories, but this solver and net ask for "
            f"{len(names) * len(net.stored)}: it is of another one"
        )
    for number, array in enumerate(found.history):
        shape = tuple(net.stored[number % len(net.stored)].tensor.shape)
        if array.size != np.prod(shape, dtype=int):
            raise ValueError(
                f"history {number} of {path} has the shape {list(array.shape)}, but the net asks "
                f"for {list(shape)}: it is of another one"
            )
    model = found.learned_net
    if not Path(model).exists() and (Path(path).parent / Path(model).name).exists():
        model = str(Path(path).parent / Path(model).name)
    copy_weights(net, weights.read(model), file=model)
    for place, blob in enumerate(net.stored):
        tensor = blob.tensor
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            optimizer.state[tensor] = {
                "step": torch.tensor(float(found.iteration)),
                **{
                    name: torch.from_numpy(np.array(found.history[which * len(net.stored) + place]))
                    .reshape(tensor.shape)
                    for which, name in enumerate(names)
                },
            }  # fmt: skip
    return found
