"""What sharing out the optimizer gives where updates take a visible part of a step.

A model of the sizes of BERT base, 110 million parameters, is trained with AdamW on four emulated
hosts. Its forward and backward passes are replayed, its updates are real. With and without
`shard_optimizer=True` take turns in the same processes. Parameters must be the same on all ranks,
and those of both ways equal within rounding.

    sudo python benchmarks/shard.py --json benchmarks/records/shard.json
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

HOSTS = 4
LINK_BPS = 2e9
TURN = 3
ARMS = {"whole": False, "sharded": True}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument(
        "--computing-s",
        type=float,
        default=4.5,
        help="seconds of a forward and a backward pass, one third and two thirds (%(default)s)",
    )
    parser.add_argument("--fused", action="store_true", help="AdamW as one kernel per tensor")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        return as_rank(args.rounds, args.computing_s, fused=args.fused)
    from soonest.lab import Lab
    from soonest.lab.messages import listen

    told: dict[str, dict[str, Any]] = {}

    def take(_: int, message: dict[str, Any]) -> None:
        told[message["kind"]] = message
        if message["kind"] == "turn":
            print(f"{message['arm']}: {message['step_s']:.2f} s a step", flush=True)

    print(f"{HOSTS} hosts, links of {LINK_BPS / 1e9:g} Gbit/s: warming up", flush=True)
    with Lab(HOSTS, LINK_BPS) as lab:
        command = [sys.executable, __file__, "--as-rank", "--rounds", str(args.rounds)]
        command += ["--computing-s", str(args.computing_s), *["--fused"] * args.fused]
        listen(lab, command, take, say=print, timeout_s=1800)
    found = told["found"]
    whole, sharded = (found["arms"][arm] for arm in ARMS)
    print(
        f"{found['parameters'] / 1e6:.0f} million parameters, computing takes "
        f"{args.computing_s:g} s: whole {whole['step_s']:.2f} s, sharded "
        f"{sharded['step_s']:.2f} s, {whole['step_s'] / sharded['step_s']:.3f} times as fast; "
        f"optimizer state of a rank {whole['state_mb']:.0f} and {sharded['state_mb']:.0f} MB, "
        f"{sharded['state_mb'] / whole['state_mb']:.3f} of it"
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def bert(computing_s: float) -> Any:
    """Layers of BERT base; times in proportion to parameters, but for the embeddings."""
    from soonest.core.trace import Layer, Trace

    width, inner = 768, 3072
    sizes = [("embeddings", (30522 + 512 + 2) * width + 2 * width)]
    for block in range(12):
        sizes += [
            (f"{block}.attention", 4 * (width + 1) * width),
            (f"{block}.norm", 2 * width),
            (f"{block}.inner", (width + 1) * inner),
            (f"{block}.outer", (inner + 1) * width),
            (f"{block}.last norm", 2 * width),
        ]
    sizes.append(("pooler", (width + 1) * width))
    computing = sum(size for name, size in sizes if name != "embeddings")
    return Trace(
        "bert-like",
        tuple(
            Layer(
                name,
                4 * size,
                fwd_us=0.0 if name == "embeddings" else 1e6 * computing_s / 3 * size / computing,
                bwd_us=0.0 if name == "embeddings" else 2e6 * computing_s / 3 * size / computing,
            )
            for name, size in sizes
        ),
    )


def as_rank(rounds: int, computing_s: float, *, fused: bool) -> int:
    import torch
    import torch.distributed as dist

    import soonest
    from soonest.lab.messages import tell
    from soonest.lab.replay import Replay

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    models = {arm: Replay(bert(computing_s)) for arm in ARMS}
    optimizers = {
        arm: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        for arm, model in models.items()
    }
    handles = {
        arm: soonest.prioritize(models[arm], optimizers[arm], shard_optimizer=sharded)
        for arm, sharded in ARMS.items()
    }

    def train(arm: str, steps: int) -> list[float]:
        dist.barrier()
        began_s: list[float] = []
        for _ in range(steps + 1):
            loss = models[arm]()
            began_s.append(time.perf_counter())
            optimizers[arm].zero_grad()
            loss.backward()
            optimizers[arm].step()
        handles[arm].flush()
        return [end - start for start, end in pairwise(began_s)]

    taken_s: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm in ARMS:
        while not handles[arm].settled:
            train(arm, 1)
    most = max(model.steps for model in models.values())
    for arm in ARMS:  # both make as many steps, so they must come to the same
        while models[arm].steps < most:
            train(arm, 1)
        assert models[arm].steps == most
    for _ in range(rounds):
        for arm in ARMS:
            taken_s[arm] += train(arm, TURN)
            if dist.get_rank() == 0:
                tell("turn", arm=arm, step_s=statistics.median(taken_s[arm]))
    sums: list[Any] = [None] * HOSTS
    dist.all_gather_object(sums, [model.checksum() for model in models.values()])
    assert all(one == sums[0] for one in sums), "the ranks have different parameters"
    for a, b in zip(*(model.parameters() for model in models.values()), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-4)
    state_mb = {
        "whole": _megabytes(optimizers["whole"].state.values()),
        "sharded": _megabytes(handles["sharded"].local_optimizer_state().values()),
    }
    if dist.get_rank() == 0:
        tell(
            "found",
            hosts=HOSTS,
            link_bps=LINK_BPS,
            computing_s=computing_s,
            fused=fused,
            parameters=sum(p.numel() for p in models["whole"].parameters()),
            arms={
                arm: {
                    "step_s": statistics.median(taken_s[arm]),
                    "step_s_all": taken_s[arm],
                    "state_mb": state_mb[arm],
                }
                for arm in ARMS
            },
        )
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _megabytes(states: Any) -> float:
    return sum(t.nbytes for state in states for t in state.values() if hasattr(t, "nbytes")) / 1e6


if __name__ == "__main__":
    sys.exit(main())
