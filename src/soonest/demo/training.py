"""The demo's training loop, the same for every arm."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from soonest.demo.arms import MAKERS
from soonest.demo.data import Corpus, batches, held_out_batches
from soonest.demo.model import CONTEXT, Gpt
from soonest.demo.settings import Settings


class Training:
    """A model that learns the corpus.

    Args:
        name: of the arm.
        settings: of the run.
        corpus: to learn.
    """

    def __init__(self, name: str, settings: Settings, corpus: Corpus) -> None:
        self._settings = settings
        self._corpus = corpus
        self._batches = batches(
            corpus.train,
            seed=settings.seed * dist.get_world_size() + dist.get_rank(),
            size=settings.batch,
            length=CONTEXT,
        )
        torch.manual_seed(settings.seed)
        model = Gpt()
        self._optimizer = AdamW(
            model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.arm = MAKERS[name](model, self._optimizer)
        self._schedule = LambdaLR(self._optimizer, self._learning_rate)

    def steps(self, number: int) -> Iterator[tuple[float, float]]:
        """Trains, and yields the loss (nats per byte) and the seconds of each step."""
        for _ in range(number):
            began_s = time.perf_counter()
            loss = self.arm.model(*next(self._batches))
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._schedule.step()
            yield loss.item(), time.perf_counter() - began_s

    @torch.no_grad()
    def test(self) -> float:
        """The loss on this rank's share of the held-out text, nats per byte."""
        pieces = held_out_batches(
            self._corpus.held_out,
            pieces=self._settings.test_pieces,
            size=self._settings.batch,
            length=CONTEXT,
            rank=dist.get_rank(),
            ranks=dist.get_world_size(),
        )
        losses = [self.arm.model(*batch).item() for batch in pieces]
        return sum(losses) / len(losses)

    def checksum(self) -> str:
        """Of every bit of every parameter."""
        digest = hashlib.sha256()
        for parameter in self.arm.model.parameters():
            digest.update(parameter.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _learning_rate(self, step: int) -> float:
        """As a share of its peak: up in a line, then down along a cosine."""
        rest = 1 - min(1.0, step / self._settings.steps)
        return min((step + 1) / self._settings.warmup, 0.5 - 0.5 * math.cos(math.pi * rest))
