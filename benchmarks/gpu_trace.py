"""What a profiler's trace of a GPU shows of overlap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

Span = tuple[float, float]


def overlap_of(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """How much of what runs on other streams runs at the same time as the model computes.

    Args:
        events: ``traceEvents`` of a trace in Chrome's format, times in microseconds.

    Returns:
        ``streams`` on which kernels ran; ``computing_us`` on the busiest one, which is the model's;
        ``beside_us`` on all others together; ``overlapped_us``, the part of that during which the
        model computed; ``waits``, how often the host waited for the device.
    """
    by_stream: defaultdict[Any, list[Span]] = defaultdict(list)
    waits = 0
    for event in events:
        if event.get("ph") != "X":
            continue
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            start = float(event["ts"])
            span = (start, start + float(event["dur"]))
            by_stream[event.get("args", {}).get("stream")].append(span)
        elif event.get("cat") == "cuda_runtime" and "Synchronize" in event.get("name", ""):
            waits += 1
    covered = {stream: united(spans) for stream, spans in by_stream.items()}
    busiest = max(covered, key=lambda stream: length(covered[stream]), default=None)
    computing = covered.get(busiest, [])
    beside = united(
        [span for stream, spans in covered.items() if stream != busiest for span in spans]
    )
    both = length(computing) + length(beside) - length(united([*computing, *beside]))
    return {
        "streams": len(covered),
        "computing_us": length(computing),
        "beside_us": length(beside),
        "overlapped_us": both,
        "waits": waits,
    }


def united(spans: Sequence[Span]) -> list[Span]:
    """The same time as spans that do not overlap, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)
