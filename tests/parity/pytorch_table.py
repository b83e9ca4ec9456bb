"""The table of PyTorch's own tests: which pass with our class, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

TABLE = Path(__file__).parents[2] / "docs" / "pytorch-tests.md"
EXCEPTIONS = {
    "test_ddp_native_mixed_precision_ignored_params": (
        "asks for `mixed_precision`, which is refused with a sentence: gradients are reduced in "
        "the dtype that parameters have when wrapped (with torch's class, too, it does not train "
        "on CPUs)"
    ),
    "test_ddp_profiling_torch_profiler": (
        "counts the all-reduces of the C++ Reducer in a profile of the thread that runs the "
        "backward pass; ours are sent from a thread of their own"
    ),
    "test_different_graph_across_ranks": (
        "reads in the C++ Reducer's private log that it never rebuilds buckets under "
        "`find_unused_parameters`; ours makes its plan after the first step in any case"
    ),
}
"""Tests that pass with torch's own class, and not with ours. No other may join them."""
MOST = 3

_HEAD = """\
# PyTorch's own tests of DistributedDataParallel

The torch wheel ships the tests of `torch.nn.parallel.DistributedDataParallel`. Those that pass with
torch's class on CPUs (gloo, 2 ranks, CUDA devices mapped to the CPU) also run with
`soonest.DistributedDataParallel` in its place, in `tests/parity/test_pytorch_suite.py`: {passed} of
{all} pass. This page is generated, and compared there:

    cd tests; python -m parity.pytorch_table

| test | soonest | why not |
|---|---|---|
"""


def table(names: Iterable[str]) -> str:
    """The page for these tests, those of the control list."""
    rows = [(name, EXCEPTIONS.get(name)) for name in names]
    head = _HEAD.format(passed=sum(why is None for _, why in rows), all=len(rows))
    lines = (f"| `{name}` | {'no' if why else 'passes'} | {why or ''} |" for name, why in rows)
    return head + "\n".join(line.replace("  |", " |") for line in lines) + "\n"


if __name__ == "__main__":
    from parity.pytorch_suite import control

    TABLE.write_text(table(control()), encoding="utf-8")
