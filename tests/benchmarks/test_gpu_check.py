"""What of ``benchmarks/gpu_check.py`` can be checked without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _path() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run for minutes")
def test_without_a_gpu_it_says_so_in_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_check.py"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("there is no GPU")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("alexnet", 61_100_840),
        ("vgg16", 138_357_544),
        ("resnet50", 25_557_032),
        ("gpt2-small", 124_439_808),
    ],
)
def test_models_have_their_published_sizes(name: str, parameters: int) -> None:
    from gpu_models import WORKS

    with torch.device("meta"):
        model = WORKS[name].make()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_all_parts_fit_into_the_time() -> None:
    import gpu_check
    import gpu_rank

    for gpus in (1, 2, 8, 64):
        parts = gpu_check.parts_for(gpus)
        assert {part.what for part in parts} == set(gpu_rank.PARTS)
        assert all(part.ranks <= max(2, min(gpus, 8)) for part in parts)
        assert len({part.name for part in parts}) == len(parts)
    assert gpu_check.LIMIT_S < 8 * 60


def kernel(stream: int, start: float, duration: float) -> dict[str, Any]:
    return {
        "ph": "X", "cat": "kernel", "name": "k", "ts": start, "dur": duration,
        "args": {"stream": stream},
    }  # fmt: skip


def test_overlap_is_measured() -> None:
    from gpu_trace import overlap_of

    events = [
        kernel(7, 0, 10), kernel(7, 20, 10), kernel(7, 25, 10),
        kernel(8, 5, 10), kernel(9, 12, 2), kernel(8, 40, 5),
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 1, "dur": 1},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1, "dur": 1},
        {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    assert overlap_of(events) == {
        "streams": 3, "computing_us": 25, "beside_us": 15, "overlapped_us": 5, "waits": 1,
    }  # fmt: skip
    assert overlap_of([])["overlapped_us"] == 0


def test_differences_are_named() -> None:
    from gpu_parity import difference

    one, other = [torch.ones(2)], [torch.ones(2) + 1e-5]
    assert difference(one, one, exact=True) is None
    assert difference(one, other, exact=False) is None
    assert difference(one, other, exact=True) == "value 0 is off by 1e-05, as by rounding"
    assert difference(one, [torch.ones(2) + 1e-3], exact=True) == "value 0 is off by 0.001"
    assert difference(one, [], exact=True) == "1 values instead of 0"
    assert difference([one[0] / 0], one, exact=True) == "value 0 is not finite"


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_rank

    def run(batch: int) -> str:
        if batch > 3:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return f"fits with {batch}"

    monkeypatch.setattr(gpu_rank.torch.cuda, "empty_cache", lambda: None)
    assert gpu_rank._if_it_fits(10, run) == (2, "fits with 2")
    with pytest.raises(torch.OutOfMemoryError):
        gpu_rank._if_it_fits(10, lambda batch: run(10))
