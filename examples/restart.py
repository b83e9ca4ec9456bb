"""Training that outlives its ranks: when one is lost, all go on from the last checkpoint.

torchrun --nproc-per-node 2 --max-restarts 3 examples/restart.py     # kill a rank meanwhile
torchrun --nproc-per-node 3 examples/restart.py --steps 400          # and go on with three
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader, Sampler

import soonest
from soonest.demo.data import Corpus
from soonest.demo.model import CONTEXT, Gpt

BATCH = 4
SIZE = {"width": 64, "depth": 4, "heads": 4}


class Order(Sampler[list[int]]):
    """Batches of all samples in a random order, epoch after epoch, dealt out to the ranks.

    Its place is how many samples all ranks have trained on, so it means the same to any number of
    them, and a loader that fetches ahead does not move it.
    """

    def __init__(self, samples: int) -> None:
        self.samples, self.trained_on = samples, 0

    def __iter__(self) -> Iterator[list[int]]:
        number, ranks = self.trained_on + dist.get_rank(), dist.get_world_size()
        while True:
            mine = (divmod(number + i * ranks, self.samples) for i in range(BATCH))
            yield [permutation(epoch, self.samples)[index] for epoch, index in mine]
            number += BATCH * ranks

    def state_dict(self) -> dict[str, int]:
        return {"trained_on": self.trained_on}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.trained_on = state["trained_on"]


@cache
def permutation(epoch: int, samples: int) -> list[int]:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(epoch)).tolist()


class Checkpoints:
    """Saves while training goes on, and finds the newest checkpoint that is whole.

    Its threads talk over a group of their own, so that their messages mix with no others.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder, self.content = folder, content
        self.group: Any = dist.new_group(backend="gloo")
        self.stager = DefaultStager(StagingOptions(False, False, True, False))  # in a thread
        self.saving: Any = None

    def save(self, step: int) -> None:
        """Begins to save; ``copied`` must follow before the next ``optimizer.step()``."""
        self.finish()
        at = self.folder / f"step-{step:06}"
        self.saving = async_save(
            self.content, checkpoint_id=at, process_group=self.group, async_stager=self.stager
        )

    def copied(self) -> None:
        """Returns when what is saved may change."""
        if self.saving is not None:
            self.saving.staging_completion.result()

    def finish(self) -> None:
        """Returns when what is saved is on disk; then only the last two are kept."""
        if self.saving is not None:
            self.saving.upload_completion.result()
            self.saving = None
            for old in self.whole()[:-2] if dist.get_rank() == 0 else ():
                shutil.rmtree(old)

    def load(self) -> int:
        """Takes over the newest one; returns after how many steps it was taken."""
        newest: list[Any] = [max(self.whole(), default=None)]
        dist.broadcast_object_list(newest, group=self.group)
        if newest[0] is None:
            return 0
        load(self.content, checkpoint_id=newest[0], process_group=self.group)
        return int(newest[0].name.removeprefix("step-"))

    def whole(self) -> list[Path]:
        # The metadata come last: where they are missing, a rank was lost while it was written.
        return sorted(path.parent for path in self.folder.glob("step-*/.metadata"))


def connect() -> None:
    """As ``init_process_group("gloo")``, but no rank finds addresses of those before a restart.

    torchrun keeps its key-value store when it starts ranks anew, and torch names its keys alike.
    """
    store, rank, ranks = next(iter(rendezvous("env://")))
    store = PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="so many steps, a checkpoint")
    parser.add_argument("--shard", action="store_true", help="share out the optimizer's state")
    args = parser.parse_args()

    connect()
    ranks, is_first = dist.get_world_size(), dist.get_rank() == 0
    samples: Any = Corpus.read(most_bytes=1_000_000).train.unfold(0, CONTEXT + 1, CONTEXT)
    torch.manual_seed(0)
    model = Gpt(**SIZE)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    handle = soonest.prioritize(model, optimizer, shard_optimizer=args.shard)
    order = Order(len(samples))
    content = {"training": handle, "schedule": schedule, "order": order}
    checkpoints = Checkpoints(args.folder, content)
    begin = checkpoints.load()
    if is_first:
        print(f"{ranks} ranks go on after {begin} steps", flush=True)

    batches = iter(DataLoader(samples, batch_sampler=order))
    for step in range(begin, args.steps):
        pieces = next(batches).long()
        loss = model(pieces[:, :-1], pieces[:, 1:])
        # What the steps before have changed is all here now, since this forward pass needed it. So
        # nothing is waited for, and it is copied while the backward pass runs.
        if step % args.every == 0 and step > begin:
            checkpoints.save(step)
        optimizer.zero_grad()
        loss.backward()
        checkpoints.copied()
        optimizer.step()
        schedule.step()
        order.trained_on += BATCH * ranks
        if is_first:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    if begin < args.steps:
        checkpoints.save(args.steps)
    checkpoints.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except soonest.PeerLostError as lost:
        sys.exit(f"This rank ends, to be started again: {lost}")
