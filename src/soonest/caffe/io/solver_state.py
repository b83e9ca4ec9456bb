"""What a solver needs to go on: ``.solverstate`` and ``.solverstate.h5``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soonest.caffe.files import mapped, read_bytes
from soonest.caffe.io import hdf5
from soonest.caffe.io.blobs import Array, to_array, to_blob
from soonest.caffe.io.weights import write_message
from soonest.caffe.proto import wire
from soonest.caffe.proto.message import Message


@dataclass(frozen=True)
class State:
    """Where a solver stands.

    Attributes:
        iteration: how many have been done.
        learned_net: the file with the weights.
        history: of every parameter; solvers with two histories have all first ones, then all second
            ones.
        current_step: how many steps the rate has taken.
    """

    iteration: int
    learned_net: str
    history: Sequence[Array]
    current_step: int = 0

    def write(self, path: str | Path) -> None:
        """Writes it, as HDF5 if the name ends so.

        Raises:
            ValueError: it cannot be written.
        """
        if Path(path).suffix != ".h5":
            write_message(
                path,
                Message(
                    "SolverState",
                    iter=self.iteration,
                    learned_net=self.learned_net,
                    history=[to_blob(array) for array in self.history],
                    current_step=self.current_step,
                ),
            )
            return
        with hdf5.open_to_write(path) as file:
            file["iter"] = np.array([self.iteration], dtype=np.int32)
            file["current_step"] = np.array([self.current_step], dtype=np.int32)
            file["learned_net"] = np.bytes_(self.learned_net.encode())
            group = file.create_group("history")
            for number, array in enumerate(self.history):
                group.create_dataset(str(number), data=array)


def read(path: str | Path) -> State:
    """The state in a file, binary or HDF5.

    Raises:
        ValueError: it cannot be read, or is damaged.
    """
    what = "a solver's state"
    read_bytes(path, what, limit=1)
    if ".caffemodel" in Path(path).name:
        raise ValueError(
            f"{path} holds weights: start from them with --weights, or go on with the "
            ".solverstate that was saved beside it"
        )
    if not hdf5.is_hdf5(path):
        found = wire.decode(mapped(path, what), "SolverState", file=str(path))
        return State(
            found.iter,
            found.learned_net,
            [
                to_array(blob, f"history {number} of {path}")
                for number, blob in enumerate(found.history)
            ],
            found.current_step,
        )
    with hdf5.open_to_read(path, what) as file:
        missing = [name for name in ("iter", "learned_net", "history") if name not in file]
        if missing:
            raise ValueError(f"{path} has no {missing[0]!r}: it is no solver's state")
        return State(
            _number(file["iter"], f"iter of {path}"),
            hdf5.word(file["learned_net"], f"learned_net of {path}"),
            list(hdf5.numbered(file["history"], f"history of {path}").values()),
            _number(file["current_step"], f"current_step of {path}")
            if "current_step" in file
            else 0,
        )


def _number(data: Any, what: str) -> int:
    found = hdf5.values(data, what, np.int64).reshape(-1)
    if len(found) != 1:
        raise ValueError(f"{what} has {len(found)} numbers: it must be one")
    return int(found[0])
