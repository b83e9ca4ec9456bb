"""One rank of the demo, as a process: ``python -m soonest.demo.rank measure|train SETTINGS``."""

from __future__ import annotations

import signal
import statistics
import sys
import time
from itertools import pairwise

import torch
import torch.distributed as dist

from soonest.demo.data import Corpus, batches
from soonest.demo.messages import tell
from soonest.demo.model import CONTEXT, Gpt
from soonest.demo.settings import COMPARED, Settings
from soonest.demo.training import Training
from soonest.runtime.layout import trainable


def measure(settings: Settings) -> None:
    """Tells how long forward and backward pass take, with all ranks busy and nothing sent."""
    model = Gpt()
    pieces = batches(Corpus.read().train, seed=0, size=settings.batch, length=CONTEXT)
    dist.barrier()
    began: list[float] = []
    for _ in range(7):
        began.append(time.perf_counter())
        model(*next(pieces)).backward()
    seconds = [end - start for start, end in pairwise(began)]
    size = sum(parameter.nbytes for parameter in model.parameters())
    tell("compute", seconds=statistics.median(seconds), gradient_bytes=size)
    dist.barrier()


def train(settings: Settings) -> None:
    """Trains the arms in turn, so that whatever disturbs the machine disturbs all alike."""
    corpus = Corpus.read()
    trainings = {name: Training(name, settings, corpus) for name in COMPARED}
    for first in range(0, settings.steps, settings.block):
        for name, training in trainings.items():
            _block(name, training, first, min(settings.block, settings.steps - first))
    for name, training in trainings.items():
        tell("trained", arm=name, checksum=training.checksum(), test_nats=training.test())
    for name, training in trainings.items():
        _timelines(name, training, settings)
    _block("ddp-small", Training("ddp-small", settings, corpus), 0, settings.timed)


def _block(name: str, training: Training, first: int, number: int) -> None:
    dist.barrier()
    for step, (loss, seconds) in enumerate(training.steps(number), first):
        # The first step of a block finds the network idle, so it is no step like the others.
        timed = seconds if step > first else None
        tell("step", arm=name, step=step, loss=loss.hex(), seconds=timed)
    training.arm.flush()


def _timelines(name: str, training: Training, settings: Settings) -> None:
    """Tells the timeline of a typical step."""
    training.arm.observe()
    dist.barrier()
    seen = {}
    for _ in training.steps(settings.pictured):
        if (timeline := training.arm.timeline()) is not None:
            seen[timeline.step_s] = timeline
    training.arm.flush()
    if seen:
        typical = seen[statistics.median_low(seen)]
        sizes: dict[str, int] = {}
        for _, layer, parameter in trainable(training.arm.model):
            layer = layer.removeprefix("module.")  # DDP's name for the model
            sizes[layer] = sizes.get(layer, 0) + parameter.nbytes
        tell("timeline", arm=name, timeline=typical.to_json(), layer_bytes=sizes)


def main() -> None:
    # Ctrl-C reaches every process of a terminal; the one that started the ranks ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    what, settings = sys.argv[1], Settings.from_text(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    {"measure": measure, "train": train}[what](settings)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
