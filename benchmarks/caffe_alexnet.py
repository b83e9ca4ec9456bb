"""AlexNet as Caffe's users have it, trained by `soonest caffe`: a step's time on two hosts.

The prototxt in `examples/caffe` has AlexNet's full shape, 61 million parameters. Its forward and
backward passes are really computed, on made-up images. All arms run the same loop on the same net
in the same processes, in turn:

- `sequential`: as Caffe's own multi-GPU mode, one all-reduce per blob after the backward pass;
- `ddp`: DistributedDataParallel around the same net;
- `soonest`: what `soonest caffe train` does.

From the same weights and images they must come to the same weights. The bound is what computing
takes without any sharing, or what the links take for the gradients, whichever is more.

    sudo python benchmarks/caffe_alexnet.py --json benchmarks/records/caffe-alexnet.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HOSTS = 2
ARMS = ("sequential", "ddp", "soonest")
CHECKED = 2
"""Iterations after which the arms must have the same weights."""
SOLVER = Path(__file__).parents[1] / "examples" / "caffe" / "alexnet_solver.prototxt"


def main() -> int:
    from soonest.cli.request import rate

    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--solver", type=Path, default=SOLVER, help="another than AlexNet's")
    parser.add_argument("--link", type=rate, default=2e9, metavar="RATE", help="(2gbit)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each arm (%(default)s)")
    parser.add_argument("--turn", type=int, default=4, help="steps of a turn (%(default)s)")
    parser.add_argument("--arms", default=",".join(ARMS), help="%(default)s")
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        return as_rank(args)
    from soonest.lab import Lab
    from soonest.lab.links import PAYLOAD_SHARE
    from soonest.lab.messages import listen

    found: dict[str, Any] = {}

    def take(_: int, message: dict[str, Any]) -> None:
        if message["kind"] == "turn":
            print(f"{message['arm']}: {message['step_ms']:.0f} ms a step", flush=True)
        else:
            found.update(message)

    words = ["--solver", str(args.solver.resolve()), "--arms", args.arms]
    words += ["--rounds", str(args.rounds), "--turn", str(args.turn)]
    with Lab(HOSTS, args.link) as lab:
        command = [sys.executable, __file__, "--as-rank", *words]
        listen(lab, command, take, say=print, timeout_s=3600)
    # Each host sends half of the gradients twice, and receives as much at the same time.
    link_ms = 1e3 * 8 * found["bytes"] / (args.link * PAYLOAD_SHARE)
    bound_ms = max(found["local_ms"], link_ms)
    record = {
        "solver": args.solver.name,
        "hosts": HOSTS,
        "link_bps": args.link,
        "parameters": found["bytes"] // 4,
        "local_ms": found["local_ms"],
        "link_ms": link_ms,
        "bound_ms": bound_ms,
        "arms": found["arms"],
    }
    print(
        f"{record['parameters'] / 1e6:.0f} million parameters: computing takes "
        f"{found['local_ms']:.0f} ms, the links take {link_ms:.0f} ms"
    )
    for name, arm in found["arms"].items():
        print(f"{name}: {arm['step_ms']:.0f} ms a step, {arm['step_ms'] / bound_ms:.3f} × bound")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


class Arm:
    """A way of training: the loop of `soonest caffe train`, with another way of sharing."""

    def __init__(self, name: str, solver: Path) -> None:
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        from soonest.caffe.io import prototxt
        from soonest.caffe.io.log import silent
        from soonest.caffe.solver.training import Trainer

        message = prototxt.read_solver(solver)
        message.random_seed = 1
        message.display = 0
        message.snapshot_after_train = False
        self.name = name
        ranks = dist.get_world_size() if name == "soonest" else 1
        self.trainer = Trainer(message, rank=dist.get_rank(), ranks=ranks, say=silent)
        self.blobs = [blob.tensor for blob in self.trainer.net.stored]
        self._stepped_s: list[float] = []
        self.trainer.optimizer.register_step_post_hook(
            lambda *_: self._stepped_s.append(time.perf_counter())
        )
        if name == "ddp":
            wrapped = DistributedDataParallel(self.trainer.net, gradient_as_bucket_view=True)
            self.trainer.net = wrapped  # type: ignore[assignment]
        elif name == "sequential":
            for blob in self.blobs:
                dist.broadcast(blob.detach(), 0)
            self.trainer.optimizer.register_step_pre_hook(lambda *_: self._share())

    def _share(self) -> None:
        import torch.distributed as dist

        for blob in reversed(self.blobs):
            if blob.grad is not None:
                dist.all_reduce(blob.grad.div_(HOSTS))

    def train(self, iterations: int) -> list[float]:
        """Trains, and says how many milliseconds each step took but the first."""
        import torch
        import torch.distributed as dist

        torch.manual_seed(dist.get_rank())  # The same images and dropout for every arm.
        dist.barrier()
        self._stepped_s.clear()
        self.trainer.run(iterations)
        if self.trainer.handle:
            self.trainer.handle.flush()
        return [1e3 * (end - start) for start, end in pairwise(self._stepped_s)]

    @property
    def ready(self) -> bool:
        return self.trainer.handle is None or self.trainer.handle.settled


def as_rank(args: argparse.Namespace) -> int:
    import os

    import torch
    import torch.distributed as dist

    from soonest.lab.messages import tell

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    os.chdir(args.solver.parent)  # Paths in a solver are relative to where it runs.
    arms = [Arm(name, args.solver) for name in args.arms.split(",")]
    for arm in arms:
        arm.train(CHECKED)
        for blob, first in zip(arm.blobs, arms[0].blobs, strict=True):
            torch.testing.assert_close(blob.detach(), first.detach(), rtol=1e-4, atol=1e-6)
    for arm in arms:
        while not arm.ready:
            arm.train(2)
    taken_ms: dict[str, list[float]] = {arm.name: [] for arm in arms}

    def measure(arm: Arm, name: str, turns_ms: list[float]) -> None:
        turns_ms += arm.train(args.turn + 1)
        if dist.get_rank() == 0:
            tell("turn", arm=name, step_ms=statistics.median(turns_ms))

    for number in range(args.rounds):
        for arm in arms[:: 1 - 2 * (number % 2)]:
            measure(arm, arm.name, taken_ms[arm.name])
    for arm in arms:
        sums: list[Any] = [None] * HOSTS
        dist.all_gather_object(sums, [blob.double().sum().item() for blob in arm.blobs])
        assert sums[0] == sums[1], f"with {arm.name} the ranks have different weights"
    local_ms: list[float] = []
    arms.append(Arm("local", args.solver))
    for _ in range(args.rounds):
        measure(arms[-1], "local", local_ms)
    if dist.get_rank() == 0:
        tell(
            "found",
            bytes=sum(4 * blob.numel() for blob in arms[0].blobs),
            local_ms=statistics.median(local_ms),
            arms={
                name: {"step_ms": statistics.median(steps_ms), "step_ms_all": steps_ms}
                for name, steps_ms in taken_ms.items()
            },
        )
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
