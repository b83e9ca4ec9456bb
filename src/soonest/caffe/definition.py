"""Reads the text files that define nets and solvers."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from pathlib import Path

from soonest.caffe import text, upgrade
from soonest.caffe.files import read_bytes
from soonest.caffe.message import Message


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
    data = read_bytes(path, what)
    try:
        return text.parse(data, type_name, file=str(path))
    except ValueError as error:
        hint = _hint(data, str(error))
        raise ValueError(f"{error}; {hint}" if hint else str(error)) from None


def _hint(data: bytes, error: str) -> str | None:
    """How to mend what is often found in files that cannot be read."""
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "the file begins with a byte order mark: save it as UTF-8 without one"
    if "ceil_mode" in error:
        return "that is of a fork: BVLC's word is round_mode, FLOOR for false and CEIL for true"
    if re.search(rb"[\"'][A-Za-z]:\\[^\\]", data):
        return "a \\ in a string begins a special character: write / or \\\\ in paths"
    return None


def _upgraded(to_new: Callable[[Message], Message], message: Message, path: str | Path) -> Message:
    try:
        return to_new(message)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
