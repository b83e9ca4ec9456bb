"""Reads the text files that define nets and solvers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from soonest.caffe.files import read_bytes
from soonest.caffe.io import upgrade
from soonest.caffe.proto import text
from soonest.caffe.proto.message import Message


def read_net(path: str | Path) -> Message:
    """A ``NetParameter`` in today's form, from a file of any age.

    Raises:
        ValueError: there is no such file, or it is no net; with line and column if it cannot be
            read.
    """
    return _upgraded(upgrade.net, _read(path, "NetParameter", "the definition of a net"), path)


def read_solver(path: str | Path) -> Message:
    """A ``SolverParameter`` in today's form, from a file of any age.

    Raises:
        ValueError: there is no such file, or it is no solver; with line and column if it cannot be
            read.
    """
    return _upgraded(upgrade.solver, _read(path, "SolverParameter", "a solver"), path)


def _read(path: str | Path, type_name: str, what: str) -> Message:
    return text.parse(read_bytes(path, what), type_name, file=str(path))


def _upgraded(to_new: Callable[[Message], Message], message: Message, path: str | Path) -> Message:
    try:
        return to_new(message)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
