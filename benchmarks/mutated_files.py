"""Reads damaged files of every format that soonest reads: a sentence, or a result, and in time.

    python benchmarks/mutated_files.py --files 100000 --json benchmarks/records/mutated-files.json

Each format starts from whole files that soonest has written or that people write by hand. A mutated
file is one of them with bytes flipped, cut out, doubled, or replaced by what stands elsewhere, or
by numbers at the ends of their ranges. To read it must give a result, or raise ``ValueError``: no
crash, no other error, no long time, and no more memory than a small multiple of what is usual.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from soonest.caffe.io import prototxt, solver_state, weights
from soonest.caffe.io.solver_state import State
from soonest.caffe.proto.text import parse
from soonest.core.cost import Cost, Network
from soonest.core.forecast.fabrics import Calibrated
from soonest.core.plan import METHODS, Bucket, Flat, Op, Plan
from soonest.core.trace import Trace
from soonest.runtime.optim import checkpoint
from soonest.runtime.tuning import calibrate, plan_file
from soonest.runtime.tuning.cache import place_of
from soonest.runtime.tuning.candidates import Trial
from soonest.runtime.tuning.trial_cache import SavedPlan, TrialCache
from soonest.writing import write_json

_SLOW_S = 5.0
_MEMORY_BYTES = 1 << 30
"""Beyond what the process has when it begins."""
_FOUND = 10
"""So many failures of a format are told of."""


class Format(NamedTuple):
    """A kind of file.

    Args:
        name: of the file, which readers may look at.
        write: writes a whole one.
        read: reads one; raises ValueError if it cannot be read.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]


_NET = """name: "small"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 } } }
layer {
  name: "ip" type: "InnerProduct" bottom: "data" top: "ip"  # a comment
  inner_product_param { num_output: 4 weight_filler { type: "gaussian" std: 0.01 } }
  param { lr_mult: 1 decay_mult: 1 } param { lr_mult: 2 }
}
"""
_SOLVER = """net: "net.prototxt" base_lr: 0.01 lr_policy: "step" gamma: 0.1 stepsize: 100
momentum: 0.9 weight_decay: 5e-4 max_iter: 450 snapshot_prefix: "x" type: "Nesterov"
"""
_LAYERS: Any = {"ip": {0: np.arange(12, dtype=np.float32).reshape(4, 3), 1: np.ones(4, np.float32)}}
_HISTORY = [np.arange(12, dtype=np.float32).reshape(4, 3), np.ones(4, np.float32)]


def _trained(path: Path) -> None:
    message = parse(_NET, "NetParameter")
    blob = parse("shape { dim: 2 dim: 2 } data: [1, 2, 3, 4]", "BlobProto")
    message.layer[1].blobs.append(blob)
    weights.write_message(path, message)


def _plan() -> Plan:
    flat = Flat.lay_out("float32", 4, [("first.weight", "first", 40), ("first.bias", "first", 4)])
    bucket = Bucket(0, 0, flat.numel, "allreduce", ("first",))
    return Plan(2, (flat,), (bucket,), (Op(0, "all_reduce"),), window=2)


def _network() -> Network:
    kinds = {kind for kinds in METHODS.values() for kind in kinds}
    return Network({kind: Cost.linear(1e-3, 1e8) for kind in sorted(kinds)})


def _trace() -> dict[str, Any]:
    layer = {"name": "first", "bytes": 4000, "fwd_us": 10.0, "bwd_us": 20.0}
    return {"model": "small", "layers": [layer, {**layer, "name": "second"}], "update_us": 3.5}


def _profile() -> dict[str, Any]:
    return {**_trace(), "ranks": 2, "network": _network().to_json()}


def _write_checkpoint(path: Path) -> None:
    def as_json(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return {"tensor": value.tolist()}
        if isinstance(value, dict):
            return {key: as_json(one) for key, one in value.items()}
        return [as_json(one) for one in value] if isinstance(value, list) else value

    write_json(path, as_json(checkpoint.form_of(*_training(), {})))


def _read_checkpoint(path: Path) -> None:
    """Loads what was saved of a training, whose tensors are written as numbers."""

    def from_json(value: Any) -> Any:
        if isinstance(value, dict) and list(value) == ["tensor"]:
            return torch.from_numpy(np.array(value["tensor"], np.float32))
        if isinstance(value, dict):
            return {key: from_json(one) for key, one in value.items()}
        return [from_json(one) for one in value] if isinstance(value, list) else value

    try:
        form = from_json(_read_json(path))
    except (TypeError, OverflowError) as error:  # no numbers: that is of this program
        raise ValueError(str(error)) from error
    model, optimizer = _training()
    checkpoint.check(model, form)
    checkpoint.take(model, optimizer, form)


def _training() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def _read_profile(path: Path) -> object:
    trace = Trace.load(path)
    return Calibrated.from_json(trace.info) if "network" in trace.info else trace


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _recall_trials(path: Path) -> object:
    memory = _remembered(path, "turns")
    memory.recall_trials({})
    return memory.trials, memory.searched


def _recall_choice(path: Path) -> object:
    return _remembered(path, "choice").saved_plan()


def _remembered(path: Path, kind: str) -> TrialCache:
    """Whoever remembers what is in a file."""
    os.environ["SOONEST_CACHE"] = str(path.parent)
    memory = TrialCache({"of": "a test"})
    place = place_of(kind, memory._job)
    assert place is not None
    place.write_bytes(path.read_bytes())
    return memory


FORMATS = {
    "net": Format("net.prototxt", lambda p: p.write_text(_NET), prototxt.read_net),
    "solver": Format("solver.prototxt", lambda p: p.write_text(_SOLVER), prototxt.read_solver),
    "caffemodel": Format("x.caffemodel", _trained, weights.read),
    "caffemodel as HDF5": Format(
        "x.caffemodel.h5", lambda p: weights.write_hdf5(p, _LAYERS), weights.read
    ),
    "solverstate": Format(
        "x.solverstate", State(7, "x.caffemodel", _HISTORY, 3).write, solver_state.read
    ),
    "solverstate as HDF5": Format(
        "x.solverstate.h5", State(7, "x.caffemodel", _HISTORY, 3).write, solver_state.read
    ),
    "plan": Format("plan.json", lambda p: plan_file.save(_plan(), p), plan_file.load),
    "checkpoint": Format("checkpoint.json", _write_checkpoint, _read_checkpoint),
    "trace": Format("trace.json", lambda p: write_json(p, _trace()), Trace.load),
    "profile": Format("profile.json", lambda p: write_json(p, _profile()), _read_profile),
    "network": Format(
        "network.json",
        lambda p: write_json(p, _network().to_json()),
        lambda p: Network.from_json(_read_json(p)),
    ),
    "calibration": Format(
        "network-x.json",
        lambda p: write_json(p, _network().to_json()),
        lambda p: calibrate._known(p, tuple(METHODS)),
    ),
    "turns": Format(
        "turns-x.json",
        lambda p: write_json(
            p, {"searched": _plan().to_json(), "turns": [Trial("usual", (0.1, 0.2))]}
        ),
        _recall_trials,
    ),
    "choice": Format(
        "choice-x.json",
        lambda p: write_json(p, SavedPlan(["first.weight"], _plan().to_json())._asdict()),
        _recall_choice,
    ),
}
_NUMBERS = [b"0", b"-1", b"1e999", b"NaN", b"null", b"4294967296", b"99999999999999999999", b"{}"]


def mutated(dice: random.Random, data: bytes) -> bytes:
    """The same with something wrong, mostly once."""
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        at = dice.randrange(len(found) + 1)
        length = min(dice.choice((1, 1, 2, 4, 8, 50)), len(found) - at)
        how = dice.randrange(7)
        if how == 0 and at < len(found):
            found[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            del found[at : at + length]
        elif how == 2:
            found[at:at] = found[at : at + length] * dice.choice((1, 1, 20))
        elif how == 3:
            other = dice.randrange(len(found) + 1)
            found[at : at + length] = found[other : other + length]
        elif how == 4:
            found[at : at + length] = bytes([dice.choice((0, 1, 0x7F, 0x80, 0xFF))]) * length
        elif how == 5:
            found[at : at + length] = dice.choice(_NUMBERS)
        else:
            del found[at:]
    return bytes(found)


def read_mutated(kind: str, files: int, seed: int) -> list[str]:
    """What went wrong with so many mutated files of a format, in words."""
    form, wrong = FORMATS[kind], list[str]()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / form.name
        form.write(path)
        whole = path.read_bytes()
        form.read(path)
        for number in range(files):
            data = mutated(random.Random(f"{kind} {seed} {number}"), whole)
            path.write_bytes(data)
            began = time.monotonic()
            try:
                signal.alarm(round(4 * _SLOW_S))
                form.read(path)
            except ValueError:
                pass
            except BaseException as error:
                wrong.append(f"{kind} {seed} {number}: {type(error).__name__}: {error}"[:300])
            finally:
                signal.alarm(0)
            if time.monotonic() - began > _SLOW_S:
                wrong.append(f"{kind} {seed} {number}: took {time.monotonic() - began:.0f} s")
            if len(wrong) >= _FOUND:
                break
    return wrong


def _too_slow(*_: object) -> None:
    raise TimeoutError("did not end")


def apart(kind: str, files: int, seed: int) -> list[str]:
    """As ``read_mutated``, in a process of its own with bounded memory, which may crash."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        signal.signal(signal.SIGALRM, _too_slow)
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = has + _MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            with os.fdopen(writer, "wb") as out:
                pickle.dump(read_mutated(kind, files, seed), out)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as found:
        data = found.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status or not data:
        return [f"{kind} {seed}: the process that reads has ended with {status}"]
    return pickle.loads(data)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000, help="of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the record")
    args = parser.parse_args(arguments)
    record: dict[str, Any] = {"files": args.files, "seed": args.seed, "wrong": {}, "seconds": {}}
    for kind in FORMATS:
        began = time.monotonic()
        record["wrong"][kind] = apart(kind, args.files, args.seed)
        record["seconds"][kind] = round(time.monotonic() - began, 1)
        print(
            f"{kind}: {len(record['wrong'][kind])} wrong, {record['seconds'][kind]} s", flush=True
        )
        for one in record["wrong"][kind]:
            print("   ", one)
    if args.json:
        write_json(args.json, record)
    return int(any(record["wrong"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
