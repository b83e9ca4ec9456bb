"""``extract_features``: what a net makes of records, as data bases."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from soonest.caffe.io import prototxt, weights
from soonest.caffe.io.log import Say
from soonest.caffe.net.net import Net
from soonest.caffe.net.trained import copy_weights
from soonest.caffe.proto import wire
from soonest.caffe.proto.message import Message
from soonest.caffe.tools.progress import tracked
from soonest.caffe.tools.store import Writer, created

TOGETHER = 1000
"""Records that are written at once."""


@torch.no_grad()
def extract(
    model: str,
    net_file: str,
    blobs: Sequence[str],
    targets: Sequence[str],
    batches: int,
    backend: str,
    *,
    say: Say,
) -> None:
    """Runs a net, in the phase TEST, and writes some of its blobs.

    Args:
        model: its weights.
        net_file: its definition.
        blobs: which to write.
        targets: a new data base for each.
        batches: how many.
        backend: of the data bases, ``lmdb`` or ``leveldb``.
        say: what log lines go to.

    Raises:
        ValueError: a file cannot be read or written, or the net has no such blob.
    """
    if len(blobs) != len(targets):
        raise ValueError(
            f"{len(blobs)} blobs and {len(targets)} data bases are given: name one for each"
        )
    net = Net(prototxt.read_net(net_file), "TEST", file=net_file)
    copy_weights(net, weights.read(model), file=model)
    for name in blobs:
        if name not in net.shapes:
            raise ValueError(
                f"the net {net_file} has no blob {name!r}: it has {', '.join(net.shapes)}"
            )
    counts = dict.fromkeys(blobs, 0)
    say("Extracting Features")
    try:
        with ExitStack() as stack:
            writers = [stack.enter_context(created(path, backend)) for path in targets]
            for _ in tracked(range(batches), "Extracting", batches):
                found = net(keep=True).blobs
                for name, writer in zip(blobs, writers, strict=True):
                    for values in found[name]:
                        _put(writer, counts[name], values)
                        counts[name] += 1
                        if counts[name] % TOGETHER == 0:
                            writer.commit()
                            say(_told(counts[name], name))
    finally:
        net.close()
    for name in blobs:
        if counts[name] % TOGETHER:
            say(_told(counts[name], name))
    say("Successfully extracted the features!")


def _put(writer: Writer, number: int, values: torch.Tensor) -> None:
    """Writes one record; shapes of fewer than three axes end in ones."""
    channels, height, width = (*values.shape, 1, 1, 1)[:3]
    datum = Message(
        "Datum", channels=channels, height=height, width=width,
        float_data=values.reshape(-1).tolist(),
    )  # fmt: skip
    writer.put(f"{number:010d}".encode(), wire.encode(datum))


def _told(count: int, name: str) -> str:
    return f"Extracted features of {count} query images for feature blob {name}"
