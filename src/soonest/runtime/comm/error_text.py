"""What errors say: where they come from, and how they are told to other ranks."""

from __future__ import annotations

import torch.distributed as dist

from soonest.errors import SoonestError

_OF_BACKENDS = (
    "gloo",
    "nccl",
    "connection",
    "socket",
    "peer",
    "timed out",
    "timeout",
    "process group",
)


def is_of_backend(error: Exception) -> bool:
    """Whether an error may be about another rank; any other would come without one, too."""
    if isinstance(error, dist.DistError | TimeoutError):
        return True
    words = str(error).lower()
    return any(word in words for word in _OF_BACKENDS)


def reason_of(error: Exception) -> str:
    """What a backend says about a collective that failed, without its guesses."""
    return str(error).split(". This is typically", 1)[0]


def said(error: BaseException) -> str:
    """An error in words for other ranks, in one line."""
    text = " ".join(str(error).split())
    if text and isinstance(error, SoonestError | ValueError):  # then it is a sentence
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
