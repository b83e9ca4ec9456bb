"""What this machine can carry: ``python -m soonest.bench.probe`` as a rank, all ranks at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from soonest.core.trace import Layer, Trace
from soonest.lab.messages import tell
from soonest.lab.replay import Replay

_LAYERS = 50
_SMALL_BYTES, _LARGE_BYTES = 16 << 10, 4 << 20
_TIMES, _LARGE_TIMES = 15, 4


def main() -> None:
    """What each rank runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    layers = tuple(Layer(str(index), 400, 0.0, 0.0) for index in range(_LAYERS))
    replay = Replay(Trace("nothing", layers), alone=True, check=True)
    optimizer = replay.sgd()
    small, large = (torch.zeros(size // 4) for size in (_SMALL_BYTES, _LARGE_BYTES))

    def step() -> None:
        loss = replay()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    found = {
        "layer_s": _time(step, _TIMES) / _LAYERS,
        "op_s": _time(lambda: dist.all_reduce(small), _TIMES),
        "bytes_per_s": _LARGE_BYTES / _time(lambda: dist.all_reduce(large), _LARGE_TIMES),
    }
    if dist.get_rank() == 0:
        tell("probed", **found)
    dist.barrier()
    dist.destroy_process_group()


def _time(work: Callable[[], object], times: int) -> float:
    """Seconds that it takes while all ranks do it.

    The least of several times counts, as whatever else runs on this machine only adds to it.
    """
    dist.barrier()
    took: list[float] = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


if __name__ == "__main__":
    main()
