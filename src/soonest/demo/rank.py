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
from soonest.demo.model import CONTEXT, Gpt
from soonest.demo.settings import ARMS, COMPARED, Settings
from soonest.demo.training import Training
from soonest.lab.messages import tell
from soonest.runtime.flat.buffers import trainable


def measure(settings: Settings) -> None:
    """Tells how long forward and backward pass take, with all ranks busy and nothing sent."""
    model = Gpt()
    pieces = batches(Corpus.read().train, seed=0, size=settings.batch, length=CONTEXT)
    dist.barrier()
    began: list[float] = []
    for _ in range(13):
        began.append(time.perf_counter())
        model(*next(pieces)).backward()
    seconds = [end - start for start, end in pairwise(began)]
    size = sum(parameter.nbytes for parameter in model.parameters())
    tell("compute", seconds=min(seconds), gradient_bytes=size)
    dist.barrier()


def train(settings: Settings) -> None:
    """Trains the arms in turn, so that whatever disturbs the machine disturbs all alike."""
    corpus = Corpus.read()
    trainings = {name: Training(name, settings, corpus) for name in ARMS}
    turns = zip(*(settings.turns(name) for name in ARMS), strict=True)
    for turn in turns:
        for (name, training), number in zip(trainings.items(), turn, strict=True):
            _turn(name, training, number)
    for name in COMPARED:
        training = trainings[name]
        tell("trained", arm=name, checksum=training.checksum(), test_nats=training.test())
    for name in COMPARED:
        _timelines(name, trainings[name], settings)


def _turn(name: str, training: Training, number: int) -> None:
    dist.barrier()
    settled = training.arm.settled
    for index, (loss, seconds) in enumerate(training.steps(number)):
        # The first step of a turn finds the network idle, so it is no step like the others.
        timed = seconds if index else None
        tell("step", arm=name, loss=loss.hex(), seconds=timed, settled=settled)
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
    """What each rank runs."""
    # Ctrl-C reaches every process of a terminal; the one that started the ranks ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    what, settings = sys.argv[1], Settings.from_text(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    {"measure": measure, "train": train}[what](settings)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
