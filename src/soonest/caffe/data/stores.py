"""Data bases of records: LMDB and LevelDB, read only, by several processes at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol
from weakref import WeakValueDictionary

_NOT_DATA = ("LOCK", "LOG", "LOG.old")
"""Files of a LevelDB that hold no records."""


class Store(Protocol):
    """Records, ordered by their keys."""

    def values(self) -> Iterator[bytes]:
        """All of them."""
        ...


def opened(source: str, backend: str) -> Store:
    """A data base, for reading.

    Args:
        source: where it is.
        backend: ``LMDB`` or ``LEVELDB``.

    Raises:
        ValueError: it cannot be read, or is empty.
    """
    path = Path(source).resolve()
    if not path.exists():
        raise ValueError(
            f"there is no data base {source}; paths are relative to the folder in which the "
            f"command runs, {Path.cwd()}"
        )
    for other, file in (("LMDB", "data.mdb"), ("LEVELDB", "CURRENT")):
        if other != backend and (path / file).exists():
            raise ValueError(
                f"its backend is {backend}, but {source} is of the other kind: say backend: {other}"
            )
    store = Lmdb(source) if backend == "LMDB" else LevelDb(source)
    if next(store.values(), None) is None:
        raise ValueError(f"the data base {source} has no records")
    return store


class Lmdb:
    """An LMDB, without the lock file that another might hold.

    Args:
        source: where it is.

    Raises:
        ValueError: it cannot be read.
    """

    _open: ClassVar[WeakValueDictionary[str, Any]] = WeakValueDictionary()
    """Those in use, by path: a process may open each only once."""

    def __init__(self, source: str) -> None:
        path = Path(source).resolve()
        base = self._open.get(str(path))
        self._base = _environment(source, path) if base is None else base
        self._open[str(path)] = self._base

    def values(self) -> Iterator[bytes]:
        with self._base.begin() as transaction:
            yield from transaction.cursor().iternext(keys=False, values=True)


def _environment(source: str, path: Path) -> Any:
    try:
        import lmdb
    except ImportError:
        raise ValueError("data bases need lmdb: pip install 'soonest[caffe]'") from None
    try:
        base = lmdb.open(source, readonly=True, lock=False, readahead=False, subdir=path.is_dir())
        file = path / "data.mdb" if path.is_dir() else path
        missing = (base.info()["last_pgno"] + 1) * base.stat()["psize"] - file.stat().st_size
    except lmdb.Error as error:
        raise ValueError(f"cannot read {source} as an LMDB data base: {error}") from None
    if missing > 0:  # To read beyond the end would be the end of the process.
        raise ValueError(f"the data base {source} is cut off: {missing} bytes of it are missing")
    return base


class LevelDb:
    """A LevelDB.

    Its library opens a folder for one process alone, and writes in it. So it is given a folder of
    its own, with links to the tables, which are never changed, and copies of what is small.

    Args:
        source: where it is.

    Raises:
        ValueError: it cannot be read.
    """

    def __init__(self, source: str) -> None:
        try:
            import plyvel
        except ImportError:
            raise ValueError(
                "LevelDB data bases need plyvel: pip install 'soonest[leveldb]'; or make an LMDB "
                f"of it where that is installed: soonest caffe leveldb_to_lmdb {source} new_lmdb"
            ) from None
        self._source, self._error = source, plyvel.Error
        self._folder = tempfile.TemporaryDirectory(prefix="soonest-leveldb-")
        try:
            for file in Path(source).resolve().iterdir():
                if file.suffix in (".ldb", ".sst"):
                    os.symlink(file, Path(self._folder.name, file.name))
                elif file.name not in _NOT_DATA:
                    shutil.copyfile(file, Path(self._folder.name, file.name))
            self._base = plyvel.DB(self._folder.name, create_if_missing=False)
        except (plyvel.Error, OSError) as error:
            raise ValueError(f"cannot read {source} as a LevelDB data base: {error}") from None

    def values(self) -> Iterator[bytes]:
        return (value for _key, value in self.items())

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Keys with their values."""
        try:
            yield from self._base.iterator(fill_cache=False)
        except self._error as error:
            raise ValueError(f"cannot read {self._source} to its end: {error}") from None


def leveldb_to_lmdb(source: str, target: str) -> int:
    """Makes an LMDB with the records of a LevelDB, and returns how many there are.

    Raises:
        ValueError: the one cannot be read, or the other not be written.
    """
    try:
        import lmdb
    except ImportError:
        raise ValueError("data bases need lmdb: pip install 'soonest[caffe]'") from None
    if Path(target).exists():
        raise ValueError(f"{target} is there already: name a new folder")
    store = opened(source, "LEVELDB")
    assert isinstance(store, LevelDb)
    count = 0
    try:
        with lmdb.open(target, map_size=2**40) as base:
            keys = store.items()
            more = True
            while more:  # Some at a time, so that they need not all be in memory.
                with base.begin(write=True) as transaction:
                    more = False
                    for key, value in keys:
                        transaction.put(key, value, append=True)
                        count += 1
                        if more := count % 1000 == 0:
                            break
    except lmdb.Error as error:
        raise ValueError(f"cannot write {target}: {error}") from None
    return count
