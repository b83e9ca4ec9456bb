"""What reading a large ``.caffemodel`` takes: through soonest, and through protobuf alone.

    python benchmarks/caffe_reader.py > benchmarks/records/caffe-reader.json

Each way runs in a process of its own on the same file, which is in the page cache, and touches one
value of every blob afterwards. Memory is what the process grew by at its peak, the mapped pages of
the file among it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from soonest.caffe.files import mapped
from soonest.caffe.io.weights import write_message
from soonest.caffe.proto import wire
from soonest.caffe.proto.message import Message
from soonest.caffe.proto.protobuf import CLASSES

BLOBS = 20


def write(path: Path, size_bytes: int) -> None:
    net = Message("NetParameter", name="large")
    for number in range(BLOBS):
        layer = net.add("layer", name=f"layer{number}", type="InnerProduct")
        values = np.full(size_bytes // BLOBS // 4, number, np.float32)
        layer.add("blobs", data=values).put("shape").dim = [len(values)]
    write_message(path, net)


def read(path: str, way: str) -> dict[str, float]:
    before_bytes = _peak_bytes()
    began_s = time.perf_counter()
    if way == "soonest":
        net = wire.decode(mapped(path, "weights"), "NetParameter")
    else:
        net = CLASSES["NetParameter"].FromString(Path(path).read_bytes())
    total = sum(layer.blobs[0].data[0] for layer in net.layer)
    took_s = time.perf_counter() - began_s
    assert total == sum(range(BLOBS))
    return {
        "took_ms": round(1e3 * took_s, 1),
        "grew_mb": round((_peak_bytes() - before_bytes) / 1e6, 1),
    }


def _peak_bytes() -> int:
    """Not by getrusage, which counts what the parent had when it forked."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--read", nargs=2, metavar=("FILE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(*args.read)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.caffemodel"
        write(path, args.mb * 10**6)
        found: dict[str, object] = {"file_mb": args.mb}
        for way in ("soonest", "protobuf"):
            command = [sys.executable, __file__, "--read", str(path), way]
            found[way] = json.loads(subprocess.run(command, check=True, stdout=-1).stdout)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
