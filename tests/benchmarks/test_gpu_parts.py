"""The parts of ``benchmarks/gpu_check.py``, with the CPU in the place of the GPU."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from parity.on_cpu import stand_in, without_device_ids
from ranks import run_ranks
from runtime.test_stream_ranks import HostStreams
from soonest.core.trace import Trace

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = ("parity", "quiet", "overhead", "host", "traces")


class _Stream(contextlib.AbstractContextManager[None]):
    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


def _cuda() -> Any:
    fake: Any = types.ModuleType("torch.cuda")
    for name in ("synchronize", "set_sync_debug_mode", "empty_cache"):
        setattr(fake, name, lambda *_: None)
    fake.Stream = lambda device: _Stream()
    fake.current_stream = _Stream
    fake.stream = lambda stream: stream
    fake.get_device_name = lambda device: "a CPU"
    return fake


def parts(names: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """What each part tells."""
    sys.path.insert(0, str(BENCHMARKS))
    import gpu_models
    import gpu_parity
    import gpu_rank

    stand_in([gpu_models, gpu_parity, gpu_rank], gpus=1)
    for module in (gpu_parity, gpu_rank):
        module.torch.cuda = _cuda()
    without_device_ids(DistributedDataParallel)
    gpu_rank.DeviceStreams = lambda device: HostStreams()
    gpu_rank._TURN_S = 0.01
    gpu_parity.STEPS = 3
    del gpu_parity.CASES["a block compiled"]  # takes seconds
    del gpu_parity.CASES["Adam capturable, rate on the device"]  # which a CPU is not
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
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            gpu_rank.tell = lambda kind, name=name, **content: told[name].append(content)
            words = ["resnet50"] if name == "overhead" else []
            gpu_rank.PARTS[name](torch.device("cpu"), Path(folder), *words)
    return told


@pytest.fixture(scope="module")
def told() -> dict[str, list[dict[str, Any]]]:
    (rank,) = run_ranks(parts, 1, PARTS)
    return rank


@pytest.mark.parametrize("name", PARTS)
def test_every_part_tells_one_thing(name: str, told: dict[str, list[dict[str, Any]]]) -> None:
    (message,) = told[name]
    assert message["found"]
    if name in ("parity", "quiet"):
        assert message["ok"] is True, message["found"]


def test_traces_can_be_read(told: dict[str, list[dict[str, Any]]]) -> None:
    traces = told["traces"][0]["figures"]["traces"]
    assert set(traces) == {"resnet50", "gpt2-small"}
    trace = Trace.from_json(traces["gpt2-small"])
    assert trace.info["device"] == "a CPU"
    assert trace.total_bytes == sum(layer.bytes for layer in trace.layers) > 50 * 64 * 4
    assert trace.forward_s > 0
    assert trace.backward_s > 0
    assert trace.update_us > 0
