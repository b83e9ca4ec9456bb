"""What of sharing overlaps when a model is compiled: not at all, by block, or as a whole.

Two emulated hosts train a model of equal blocks whose computing is replayed inside of operators, so
that `torch.compile` takes them as they are. Sharing takes as long as computing. All ways of
training take turns in the same processes, and their losses must be equal to the last bit.

    sudo python benchmarks/compiled.py --json benchmarks/records/compiled.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LINK_BPS = 2e8
BLOCKS, LAYERS = 8, 2
FORWARD_S = 0.01
"""Of each layer; its backward pass takes twice as long."""
ARMS = ("ddp", "drop-in", "soonest")
"""``drop-in`` is soonest's own class, whose graph torch cuts by buckets when it is compiled."""
HOW = ("not compiled", "by block", "whole")
TURN = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=4, help="turns of each way (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        return as_rank(args.rounds)
    from soonest.lab import Lab
    from soonest.lab.messages import listen

    told: dict[str, Any] = {}

    def take(_: int, message: dict[str, Any]) -> None:
        told.update(message)

    with Lab(2, LINK_BPS) as lab:
        command = [sys.executable, __file__, "--as-rank", "--rounds", str(args.rounds)]
        listen(lab, command, take, say=print, timeout_s=1800)
    computing_ms, sharing_ms = told["computing_ms"], told["sharing_ms"]
    print(f"computing {computing_ms:.0f} ms, sharing {sharing_ms:.0f} ms")
    overlap: dict[str, float] = {}
    for arm, step_ms in told["step_ms"].items():
        overlap[arm] = (computing_ms + sharing_ms - step_ms) / sharing_ms
        print(f"{arm}: {step_ms:.0f} ms a step, {overlap[arm]:.0%} of sharing overlaps")
    if args.json:
        del told["kind"]
        record = {"link_bps": LINK_BPS, "blocks": BLOCKS, "layers": LAYERS, **told}
        text = json.dumps({**record, "overlap": overlap}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


# The ranks


def operator() -> Callable[..., Any]:
    """Computes next to nothing for a while; so does its backward pass, for twice as long."""
    import torch
    from torch import Tensor

    one = "(Tensor x, Tensor weight) -> Tensor"
    two = "(Tensor gradient, Tensor weight) -> (Tensor, Tensor)"

    @torch.library.custom_op("soonest::work", mutates_args=(), schema=one)
    def work(x: Tensor, weight: Tensor) -> Tensor:
        time.sleep(FORWARD_S)
        return x + weight[: x.numel()]

    @work.register_fake
    def _(x: Tensor, weight: Tensor) -> Tensor:
        return torch.empty_like(x)

    @torch.library.custom_op("soonest::work_backward", mutates_args=(), schema=two)
    def work_backward(gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(2 * FORWARD_S)
        of_weight = torch.zeros_like(weight)
        of_weight[: gradient.numel()] = gradient
        return gradient.clone(), of_weight

    @work_backward.register_fake
    def _(gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(gradient), torch.empty_like(weight)

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    work.register_autograd(lambda ctx, g: work_backward(g, *ctx.saved_tensors), setup_context=keep)
    return work


def build(work: Callable[..., Any], how: str) -> Any:
    import torch
    from torch import Tensor, nn

    from soonest.lab import PAYLOAD_SHARE

    computing_s = 3 * FORWARD_S * BLOCKS * LAYERS
    numel = round(computing_s * LINK_BPS * PAYLOAD_SHARE / 32 / (BLOCKS * LAYERS))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, numel))

        def forward(self, x: Tensor) -> Tensor:
            return work(x, self.weight)

    torch.manual_seed(0)
    blocks = [nn.Sequential(*(Layer() for _ in range(LAYERS))) for _ in range(BLOCKS)]
    if how == "by block":
        for block in blocks:
            block.compile(backend="aot_eager")
    return nn.Sequential(*blocks)


def arm_of(work: Callable[..., Any], arm: str, how: str) -> tuple[Any, Any]:
    """One step of training, which returns its loss, and soonest's handle if there is one."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import soonest

    model = build(work, how)
    net: Any = model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = None
    classes = {"ddp": DistributedDataParallel, "drop-in": soonest.DistributedDataParallel}
    if arm in classes:
        net = classes[arm](model, bucket_cap_mb=1, gradient_as_bucket_view=True)
    if how == "whole":
        net = torch.compile(net, backend="aot_eager")
    if arm == "soonest":
        handle = soonest.prioritize(net, optimizer)
    x = torch.ones(16) + dist.get_rank()

    def step() -> float:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, handle


def as_rank(rounds: int) -> int:
    import torch
    import torch.distributed as dist

    from soonest.lab.messages import tell

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    work = operator()
    ways = {
        f"{arm}, {how}": arm_of(work, arm, how)
        for how in HOW
        for arm in ARMS
        if arm != "drop-in" or how == "whole"
    }
    losses: dict[str, list[float]] = {name: [] for name in ways}
    for name, (step, handle) in ways.items():
        while not losses[name] or (handle and not handle.settled):
            losses[name].append(step())
        if handle:
            handle.flush()
    turns_ms: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (step, handle) in ways.items():
            dist.barrier()
            losses[name].append(step())  # finds the network idle, and so is no step like others
            began = time.perf_counter()
            losses[name] += [step() for _ in range(TURN)]
            turns_ms[name].append((time.perf_counter() - began) / TURN * 1e3)
            if handle:
                handle.flush()
    longest = max(losses.values(), key=len)
    assert all(mine == longest[: len(mine)] for mine in losses.values()), "losses differ"
    computing_ms = 3e3 * FORWARD_S * BLOCKS * LAYERS
    sharing_ms = statistics.median(sharing_s(build(work, HOW[0])) for _ in range(5)) * 1e3
    if dist.get_rank() == 0:
        tell(
            "found",
            computing_ms=computing_ms,
            sharing_ms=sharing_ms,
            step_ms={name: statistics.median(ms) for name, ms in turns_ms.items()},
            turns_ms=turns_ms,
        )
    dist.barrier()
    dist.destroy_process_group()
    return 0


def sharing_s(model: Any) -> float:
    """How long it takes to combine all gradients, by all-reduce in one piece."""
    import torch
    import torch.distributed as dist

    gradients = torch.zeros(sum(p.numel() for p in model.parameters()))
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(gradients)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
