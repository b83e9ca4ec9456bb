"""Writes data bases of records, LMDB and LevelDB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

_MAP_BYTES = 2**40
"""How large an LMDB may become, as in Caffe."""


class Writer(Protocol):
    """Takes records."""

    def put(self, key: bytes, value: bytes) -> None:
        """Adds a record; in the data base they are ordered by their keys."""
        ...

    def commit(self) -> None:
        """Writes what has been put so far."""
        ...


@contextmanager
def created(path: str, backend: str) -> Iterator[Writer]:
    """Makes a data base.

    Args:
        path: of the new folder.
        backend: ``lmdb`` or ``leveldb``.

    Raises:
        ValueError: it is there already, or cannot be written.
    """
    if Path(path).exists():
        raise ValueError(f"{path} is there already: delete it, or name another")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"cannot write {path}: make its folder first")
    kinds = {"lmdb": _lmdb, "leveldb": _leveldb}
    if backend not in kinds:
        raise ValueError(f"no data base {backend!r} exists: take lmdb or leveldb")
    with kinds[backend](path) as writer:
        yield writer
        writer.commit()


@contextmanager
def _lmdb(path: str) -> Iterator[Writer]:
    try:
        import lmdb
    except ImportError:
        raise ValueError("data bases need lmdb: pip install 'soonest[caffe]'") from None
    try:
        with lmdb.open(path, map_size=_MAP_BYTES) as base:
            yield _Lmdb(base)
    except lmdb.Error as error:
        raise ValueError(f"cannot write {path}: {error}") from None


class _Lmdb:
    def __init__(self, base: Any) -> None:
        self._base = base
        self._records: list[tuple[bytes, bytes]] = []

    def put(self, key: bytes, value: bytes) -> None:
        self._records.append((key, value))

    def commit(self) -> None:
        with self._base.begin(write=True) as transaction:
            for key, value in self._records:
                transaction.put(key, value)
        self._records.clear()


@contextmanager
def _leveldb(path: str) -> Iterator[Writer]:
    try:
        import plyvel
    except ImportError:
        raise ValueError(
            "LevelDB data bases need plyvel: pip install 'soonest[leveldb]', or say --backend=lmdb"
        ) from None
    try:
        base = plyvel.DB(path, create_if_missing=True, error_if_exists=True)
    except plyvel.Error as error:
        raise ValueError(f"cannot write {path}: {error}") from None
    try:
        yield _LevelDb(base)
    finally:
        base.close()


class _LevelDb:
    def __init__(self, base: Any) -> None:
        self._base = base
        self._batch = base.write_batch()

    def put(self, key: bytes, value: bytes) -> None:
        self._batch.put(key, value)

    def commit(self) -> None:
        self._batch.write()
        self._batch = self._base.write_batch()
