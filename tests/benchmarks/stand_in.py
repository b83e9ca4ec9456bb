"""What a rank of ``benchmarks/gpu_check.py`` runs where the CPU stands in for the GPU.

python tests/benchmarks/stand_in.py PART BACKEND FOLDER [WORDS…]
"""

from __future__ import annotations

import contextlib
import sys
import time
import types
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parents[1]
BENCHMARKS = _TESTS.parent / "benchmarks"
_CASES = ("AdamW fused", "BatchNorm", "a branch by rank", "all by split", "sharded")
"""Those ways of training that a rank of its own tries; each takes a while."""


class _Graph(contextlib.AbstractContextManager[None]):
    """Of a device's operations, being captured."""

    captures = False

    def __init__(self, graph: Any = None) -> None: ...

    def __enter__(self) -> None:
        _Graph.captures = True

    def __exit__(self, *_: object) -> None:
        _Graph.captures = False


class _Stream(contextlib.AbstractContextManager[None]):
    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


def _cuda() -> Any:
    fake: Any = types.ModuleType("torch.cuda")
    for name in ("synchronize", "set_sync_debug_mode", "empty_cache", "set_device"):
        setattr(fake, name, lambda *_: None)
    fake.Stream = lambda device: _Stream()
    fake.current_stream = _Stream
    fake.stream = lambda stream: stream
    fake.device_count = lambda: 1
    fake.get_device_name = lambda device: "a CPU"
    fake.CUDAGraph = object
    fake.graph = _Graph
    return fake


def stuck(*_: Any) -> None:
    """A part that never ends."""
    print("Error: this waits for ever", flush=True)
    time.sleep(600)


def rehearse() -> Any:
    """``gpu_rank`` on the CPU, with small models and few steps."""
    sys.path.insert(0, str(BENCHMARKS))
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    import gpu_models
    import gpu_parity
    import gpu_rank
    from helpers.host_streams import HostStreams
    from parity.on_cpu import stand_in, without_device_ids

    class Streams(HostStreams):
        def capturing(self) -> bool:
            return _Graph.captures

    stand_in([gpu_models, gpu_parity, gpu_rank], gpus=1)
    for module in (gpu_parity, gpu_rank):
        module.torch.cuda = _cuda()
    torch.cuda._sanitizer = types.SimpleNamespace(enable_cuda_sanitizer=lambda: None)  # type: ignore[attr-defined]
    without_device_ids(DistributedDataParallel)
    gpu_rank.DeviceStreams = lambda device: Streams()
    gpu_rank._TURN_S = 0.01
    gpu_rank.PARTS["stuck"] = stuck
    gpu_parity.STEPS = 3
    del gpu_parity.CASES["a block compiled"]  # takes seconds
    for case in ("Adam capturable, rate on the device", "offloaded"):
        del gpu_parity.CASES[case]  # which a CPU cannot
    small = gpu_models.Work(
        lambda: gpu_models.Gpt2(layers=2, width=64, vocabulary=50, context=16),
        1,
        vocabulary=50,
        length=16,
    )
    images = gpu_models.Work(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 7, 8), nn.Flatten(), nn.Linear(8 * 28 * 28, 1000)), 1
    )
    gpu_rank.WORKS = {"resnet50": images, "gpt2-small": small}
    return gpu_rank


if __name__ == "__main__":
    print("a rehearsal", flush=True)
    sys.path.insert(0, str(_TESTS))
    what, _backend, folder, *words = sys.argv[1:]
    rank = rehearse()
    cases = rank.gpu_parity.CASES
    for name in set(cases) - set(_CASES):
        del cases[name]
    rank.run(what, "gloo", folder, *words)
