"""What the demo learns: the source code of Python's own standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MOST_BYTES = 6_000_000
"""Of source code that is read: enough to never come round, and read in no time."""

HELD_OUT = 10
"""Every so many files, one is held out."""

# Neither what others have installed, nor tests, nor tables of characters and topics.
_SKIP = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on, and others to test on, from different files.

    Args:
        train, held_out: bytes, one behind the other.
        train_files, held_out_files: where they come from.
    """

    train: Tensor
    held_out: Tensor
    train_files: tuple[Path, ...]
    held_out_files: tuple[Path, ...]

    @classmethod
    def read(cls, folder: Path | None = None, *, most_bytes: int = MOST_BYTES) -> Corpus:
        """Reads Python files; the same on every rank, and every time on one machine.

        Args:
            folder: where they are; by default Python's standard library.
            most_bytes: stop reading behind so many.

        Raises:
            ValueError: there are too few.
        """
        folder = folder or Path(sysconfig.get_paths()["stdlib"])
        contents: dict[Path, bytes] = {}
        left = most_bytes
        for path in _sources(folder):
            if left <= 0:
                break
            contents[path] = path.read_bytes()[:left]
            left -= len(contents[path])
        held_out = tuple(contents)[HELD_OUT - 1 :: HELD_OUT]
        train = tuple(path for path in contents if path not in set(held_out))
        if not held_out:
            raise ValueError(f"only {len(contents)} Python files in {folder}: the demo needs more")
        return cls(
            _join(contents[path] for path in train),
            _join(contents[path] for path in held_out),
            train,
            held_out,
        )


def batches(data: Tensor, *, seed: int, size: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of pieces from random places, the same ones for the same seed.

    Args:
        data: bytes.
        seed: another one on every rank.
        size: pieces in a batch.
        length: bytes in a piece.

    Yields:
        Inputs and targets, each ``(size, length)``; a target is the byte behind its input.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - length, (size, 1), generator=generator)
        yield _pieces(data, starts, length)


def held_out_batches(
    data: Tensor, *, pieces: int, size: int, length: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of ``pieces`` pieces, evenly spread over the data, in batches."""
    starts = torch.linspace(0, len(data) - length - 1, pieces).long()[rank::ranks, None]
    for some in starts.split(size):
        yield _pieces(data, some, length)


def _pieces(data: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    pieces = data[starts + torch.arange(length + 1)].long()
    return pieces[:, :-1], pieces[:, 1:]


def _sources(folder: Path) -> list[Path]:
    found: list[Path] = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIP]
        found += [Path(here, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _join(contents: Iterator[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
