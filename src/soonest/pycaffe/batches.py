"""Cuts arrays into batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from soonest.caffe.io.blobs import Array


def batches(arrays: dict[str, Array], size: int) -> Iterator[dict[str, Any]]:
    """Batches of a size, the last one filled up with zeros."""
    count = len(next(iter(arrays.values()))) if arrays else 0
    for start in range(0, count, size):
        batch = {name: np.asarray(one[start : start + size]) for name, one in arrays.items()}
        missing = size - len(next(iter(batch.values())))
        yield {
            name: np.concatenate([one, np.zeros((missing, *one.shape[1:]), one.dtype)])
            if missing
            else one
            for name, one in batch.items()
        }
