"""Runs PyTorch's own tests of ``DistributedDataParallel`` on CPUs, with ours or with theirs.

They are in the torch wheel. Most ask for GPUs, which are the CPU here (``on_cpu``). Those that pass
with torch's own class are the control list, ``pytorch_control.txt``; in the folder ``tests``,

    python -m parity.pytorch_suite --torch --renew      # writes it again, for a new torch
    python -m parity.pytorch_suite                      # runs those in it with our class
    python -m parity.pytorch_suite --all -v NAME…       # any whose names hold one of these

Ranks are forked for each test from this one process, which has imported all they need.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import logging
import multiprocessing
import os
import re
import sys
import textwrap
import time
import types
import unittest
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RANKS = 2
TIMEOUT_S = 90
CONTROL = Path(__file__).with_name("pytorch_control.txt")
SMALLER = {"test_ddp_uneven_inputs": ("dim = 1000", "dim = 24")}
"""Tests that would take many minutes without a GPU, and what is made smaller in their text."""


@dataclass
class Result:
    """Of one test: ``pass``, ``skip`` or ``fail``, how long it took, and why, in words."""

    status: str
    took_s: float
    why: str


def control() -> list[str]:
    """The tests that pass with torch's own class."""
    lines = CONTROL.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def load(cls: str) -> type[unittest.TestCase]:
    """Imports the tests, with this class in the place of torch's: ``torch`` or ``soonest``."""
    os.environ.update(BACKEND="gloo", WORLD_SIZE=str(RANKS), SOONEST_CACHE="")
    # The base class of torch's tests adds a way to compare texts, which none of these uses.
    stub: Any = types.ModuleType("expecttest")
    stub.TestCase = unittest.TestCase
    sys.modules.setdefault("expecttest", stub)
    logging.disable(logging.INFO)

    import torch._dynamo
    import torch.distributed.checkpoint.state_dict
    import torch.nn.parallel as where

    import soonest
    from helpers.ranks import mixed_network
    from parity import on_cpu
    from soonest.runtime.tuning import calibrate

    torch.set_num_threads(1)
    calibrate.network_of = lambda ranks, **_: mixed_network(ranks.group.size())
    chosen = {"torch": where.DistributedDataParallel, "soonest": soonest.DistributedDataParallel}
    on_cpu.without_device_ids(chosen[cls])
    where.DistributedDataParallel = where.distributed.DistributedDataParallel = chosen[cls]

    import torch.testing._internal.common_distributed as common
    import torch.testing._internal.distributed.distributed_test as tests

    common.TIMEOUT_DEFAULT, common.TIMEOUT_OVERRIDE = TIMEOUT_S, {}
    on_cpu.stand_in([tests, common], gpus=RANKS)
    base = tests.DistributedTest._DistTestBase
    for name, (large, small) in SMALLER.items():
        _replace_in(base, name, large, small, vars(tests))

    class Suite(tests.TestDistBackend, base):
        def setUp(self) -> None:
            super().setUp()
            self._start_processes(multiprocessing.get_context("fork").Process)

    Suite.setUpClass()
    # Else what a test drops stays for long, with its threads and sockets: the more there is from
    # before, the more rarely all is looked through.
    gc.collect()
    gc.freeze()
    return Suite


def _replace_in(cls: type, name: str, large: str, small: str, names: dict[str, Any]) -> None:
    """Gives a class one of its methods anew, with something replaced in its text."""
    text = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(cls, name))))
    assert large in text, name
    made: dict[str, Any] = {}
    exec(text[text.index("def ") :].replace(large, small), names, made)
    setattr(cls, name, made[name])


def names_in(suite: type[unittest.TestCase]) -> list[str]:
    """All tests that have to do with DDP, themselves or in what they call."""

    def concerns_ddp(name: str, seen: frozenset[str] = frozenset()) -> bool:
        function = getattr(suite, name, None)
        if name in SMALLER:
            return True
        if not inspect.isfunction(function):
            return False
        text = inspect.getsource(inspect.unwrap(function))
        called = set(re.findall(r"self\.(_\w+)\(", text)) - seen
        return "ddp" in text.lower() or "DistributedDataParallel" in text or any(
            concerns_ddp(other, seen | called) for other in called
        )  # fmt: skip

    found = unittest.TestLoader().getTestCaseNames(suite)
    return [name for name in found if concerns_ddp(name)]


def run(suite: type[unittest.TestCase], name: str) -> Result:
    """Runs one test on fresh ranks."""
    began = time.monotonic()
    result = unittest.TestResult()
    suite(name).run(result)
    took_s = round(time.monotonic() - began, 2)
    if bad := result.errors + result.failures:
        return Result("fail", took_s, bad[0][1])
    if result.skipped:
        return Result("skip", took_s, result.skipped[0][1])
    return Result("pass", took_s, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="run only tests whose names hold one of these")
    parser.add_argument("--torch", action="store_true", help="with torch's own class")
    parser.add_argument("--all", action="store_true", help="not only those of the control list")
    parser.add_argument("--renew", action="store_true", help="write the control list")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("-v", action="store_true", help="say why tests fail")
    given = parser.parse_args()
    suite = load("torch" if given.torch else "soonest")
    names = names_in(suite) if given.all or given.renew else control()
    results: dict[str, Result] = {}
    for name in names:
        if given.names and not any(part in name for part in given.names):
            continue
        results[name] = found = run(suite, name)
        print(f"{found.status} {found.took_s:6.1f} s  {name}", flush=True)
        if given.v and found.why:
            print(found.why)
    passed = [name for name, result in results.items() if result.status == "pass"]
    took_s = sum(result.took_s for result in results.values())
    print(f"{len(passed)} of {len(results)} passed in {took_s:.0f} s")
    if given.json:
        given.json.write_text(json.dumps({n: asdict(r) for n, r in results.items()}, indent=1))
    if given.renew:
        import torch

        head = f"# Pass with torch {torch.__version__.split('+')[0]}'s own class on CPUs.\n"
        CONTROL.write_text(head + "".join(f"{name}\n" for name in passed), encoding="utf-8")


if __name__ == "__main__":
    main()
