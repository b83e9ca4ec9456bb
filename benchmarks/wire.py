"""What a narrow wire does to the accuracy: the demo's GPT, exact and with gradients in 16 bits.

Every way of training starts from the same parameters and sees the same data, with several seeds. On
plain loopback, as only results count here. Besides the loss on held-out text this tells the error
of one sum of gradients, relative to its size, as it comes out of each method.

    python benchmarks/wire.py --json benchmarks/records/wire-accuracy.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

WIRES = ("exact", "bfloat16", "float16")
METHODS = ("allreduce", "exchange", "split", "shard_direct")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, help="%(default)s")
    parser.add_argument("--steps", type=int, default=60, help="%(default)s")
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        return as_rank(args.seeds, args.steps)
    from soonest.lab import Loopback
    from soonest.lab.messages import listen

    record: dict[str, Any] = {"steps": args.steps, "bits_per_byte": {}, "error": {}}

    def take(_: int, message: dict[str, Any]) -> None:
        if message["kind"] == "error":
            record["error"] = message["relative"]
            for wire, errors in message["relative"].items():
                shown = ", ".join(f"{method} {error:.2g}" for method, error in errors.items())
                print(f"relative error of a sum in {wire}: {shown}", flush=True)
        elif message["kind"] == "trained":
            bits = message["bits_per_byte"]
            record["bits_per_byte"].setdefault(message["wire"], []).append(bits)
            print(f"seed {message['seed']}, {message['wire']}: {bits:.4f} bits/byte", flush=True)

    words = ["--as-rank", "--seeds", str(args.seeds), "--steps", str(args.steps)]
    with Loopback(2) as place:
        listen(place, [sys.executable, __file__, *words], take, say=print, timeout_s=3600)
    exact = record["bits_per_byte"]["exact"]
    for wire in WIRES[1:]:
        others = record["bits_per_byte"][wire]
        off = [b - a for a, b in zip(exact, others, strict=True)]
        print(
            f"{wire}: {statistics.mean(off):+.4f} bits per byte ({min(off):+.4f} to "
            f"{max(off):+.4f}); from seed to seed {min(exact):.4f} to {max(exact):.4f}"
        )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def as_rank(seeds: int, steps: int) -> int:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    errors()
    for seed in range(1, seeds + 1):
        for wire in WIRES:
            train(wire, seed, steps)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def errors() -> None:
    """Tells what one sum loses."""
    import torch
    import torch.distributed as dist

    from soonest.lab.messages import tell
    from soonest.runtime import comm
    from soonest.runtime.comm import groups

    ranks = groups.ranks_of(groups.private_group(None, None))
    noise = torch.Generator().manual_seed(dist.get_rank())
    mine = torch.randn(1 << 20, generator=noise)
    exact = mine.double()
    dist.all_reduce(exact)
    found: dict[str, dict[str, float]] = {}
    for wire in WIRES[1:]:
        for method in METHODS:
            total = mine.clone()
            comm.reduce(method, ranks, total, wire=getattr(torch, wire))
            error = (total.double() - exact).norm() / exact.norm()
            found.setdefault(wire, {})[method] = float(error)
    if dist.get_rank() == 0:
        tell("error", relative=found)


def train(wire: str, seed: int, steps: int) -> None:
    import torch
    import torch.distributed as dist

    import soonest
    from soonest.demo import arms
    from soonest.demo.data import Corpus
    from soonest.demo.settings import Settings
    from soonest.demo.training import Training
    from soonest.lab.messages import tell

    class Wired(arms.Soonest):
        def __init__(self, model: Any, optimizer: Any) -> None:
            self.model = model
            dtype = None if wire == "exact" else getattr(torch, wire)
            self._handle = soonest.prioritize(model, optimizer, wire_dtype=dtype)
            self.flush = self._handle.flush
            self.timeline = self._handle.timeline

    arms.MAKERS["wired"] = Wired
    training = Training("wired", replace(Settings.of(steps), seed=seed), Corpus.read())
    for _ in training.steps(steps):
        pass
    nats: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nats, training.test())
    if dist.get_rank() == 0:
        bits = statistics.mean(nats) / math.log(2)
        tell("trained", wire=wire, seed=seed, bits_per_byte=bits)


if __name__ == "__main__":
    sys.exit(main())
