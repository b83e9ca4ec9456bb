"""Trains a net as Caffe's solver does, alone or on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from soonest import Handle, prioritize
from soonest.caffe.io import log, weights
from soonest.caffe.net.debug import Watch
from soonest.caffe.net.net import Net
from soonest.caffe.net.reach import unreached
from soonest.caffe.net.trained import copy_weights, share_weights
from soonest.caffe.proto.message import Message
from soonest.caffe.solver import nets, snapshots, solvers
from soonest.caffe.solver.rates import Rate
from soonest.caffe.solver.scoring import tested
from soonest.caffe.solver.signals import Requests


class Trainer:
    """A solver at work.

    Args:
        solver: a ``SolverParameter`` in today's form.
        rank: of this process. Only the first tests, displays and saves.
        ranks: how many train together; the process group must be there.
        divide: whether batches are those of all ranks, not of each.
        say: what log lines go to.
        requests: what signals ask for.

    Attributes:
        iteration: how many are done.
        net: the net that is trained.
        tests: those that are tested.
        loss: of the last iteration, on this rank.
        handle: what synchronizes gradients, once several ranks train.

    Raises:
        ValueError: the solver or a net cannot be made.
    """

    def __init__(
        self,
        solver: Message,
        *,
        rank: int = 0,
        ranks: int = 1,
        divide: bool = False,
        say: log.Say = log.to_stderr,
        requests: Requests | None = None,
    ) -> None:
        self.solver = solver
        self._say = say if rank == 0 else log.silent
        self._first, self._ranks = rank == 0, ranks
        self._requests = requests or Requests(ranks)
        if solver.iter_size < 1 or solver.average_loss < 1 or solver.max_iter < 0:
            raise ValueError("give max_iter from 0 up, iter_size and average_loss above 0")
        self.rate = Rate(solver)
        if solver.random_seed >= 0:
            torch.manual_seed(solver.random_seed + rank)
        else:
            torch.seed()  # Another one in every run, and on every rank.
        own = nets.training(solver)
        self.net = Net(
            own.definition, "TRAIN", state=own.state, file=own.file, rank=rank, ranks=ranks,
            divide=divide,
        )  # fmt: skip
        if not any(weight for step in self.net.steps for weight in step.weights):
            raise ValueError(f"{own.file}: the net has no loss to train with: add a loss layer")
        for name in self.net.repeated_names() if self._first else ():
            log.warning(
                f"{own.file}: several layers are named {name!r}, so only the weights of the first "
                "can be read again: give each a name of its own"
            )
        self.tests: list[Net] = []
        for other in nets.testing(solver) if self._first else ():
            test = Net(other.definition, "TEST", state=other.state, file=other.file)
            share_weights(self.net, test)
            self.tests.append(test)
        if self._first and self._saves():
            snapshots.check_prefix(solver)
        self._learned = [
            blob
            for blob in self.net.stored
            if isinstance(blob.tensor, nn.Parameter) and blob.tensor.requires_grad
        ]
        self.optimizer = solvers.make(
            solver, [(blob.tensor, blob.decay_mult or 0) for blob in self._learned]
        )
        self._unreached: list[Tensor] | None = None
        self.iteration = 0
        self.loss = 0.0
        self.handle: Handle | None = None
        self._stopped = self._shown = False

    def _saves(self) -> bool:
        return self.solver.snapshot > 0 or self.solver.snapshot_after_train

    # Where it starts

    def finetune(self, paths: Sequence[str]) -> None:
        """Copies trained weights into layers of the same name.

        Raises:
            ValueError: a file cannot be read, or does not fit.
        """
        for path in paths:
            stored = weights.read(path)
            for net in (self.net, *self.tests):
                self._say(f"Finetuning from {path}")
                for name in copy_weights(net, stored, file=path):
                    self._say(f"Ignoring source layer {name}")

    def resume(self, path: str) -> None:
        """Goes on from a saved state; the data start from the first record again, as in Caffe.

        Raises:
            ValueError: it cannot be read, or does not fit.
        """
        self._say(f"Resuming from {path}")
        found = snapshots.restore(path, self.net, self.optimizer)
        self.iteration, self.rate.step = found.iteration, found.current_step

    # The loop

    def solve(self) -> None:
        """Trains to the end, tests and saves, with Caffe's log lines."""
        solver = self.solver
        self._say(f"Solving {self.net.definition.name}")
        self._say(f"Learning Rate Policy: {solver.lr_policy}")
        self.run(solver.max_iter - self.iteration)
        if solver.snapshot_after_train and not self._due(solver.snapshot):
            self.save()
        if self._stopped:
            self._say("Optimization stopped early.")
            return
        if self._first and self._due(solver.display):
            with torch.no_grad():
                # Caffe's net goes on to say what the last iteration let it say.
                watch = self._watch(self.net) if self._shown else None
                self._smoothed.add(self.net(watch=watch).loss.item())
            self._say(f"Iteration {self.iteration}, loss = {self._smoothed.value:g}")
        if self._due(solver.test_interval):
            self.test()
        self._say("Optimization Done.")

    def run(self, iterations: int) -> None:
        """Trains for so many iterations, or until a signal asks to stop."""
        solver = self.solver
        if self._ranks > 1 and self.handle is None and self._learned:
            # As in Caffe, BatchNorm's statistics stay those of each rank.
            self.handle = prioritize(
                self.net, self.optimizer, separable=True, broadcast_buffers=False
            )
        self._smoothed = log.Smoothed(solver.average_loss)
        self._pace = log.Pace(self.iteration)
        stop = self.iteration + iterations
        while self.iteration < stop and not self._stopped:
            if self._due(solver.test_interval) and (self.iteration or solver.test_initialization):
                self.test()
            self._iterate()
            asked = self._requests.next()
            if self._due(solver.snapshot) or asked == "snapshot":
                self.save()
            self._stopped = asked == "stop"

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.iteration % interval == 0

    def _iterate(self) -> None:
        solver = self.solver
        self.optimizer.zero_grad()
        self.loss = 0.0
        outputs: dict[str, Tensor] = {}
        self._shown = shown = self._due(solver.display)
        for number in range(solver.iter_size):
            watch = self._watch(self.net) if shown else None
            with self._alone(number < solver.iter_size - 1):
                result = self.net(watch=watch)
                self._backward(result.loss)
            if watch:
                watch.back()
            self.loss += result.loss.item() / solver.iter_size
            outputs = result.outputs
        self._smoothed.add(self.loss)
        if shown:
            self._show(outputs)
        self._update(shown=shown)
        self.iteration += 1

    def _backward(self, loss: Tensor) -> None:
        """Gives every learned blob a gradient, zeros where the loss does not depend on it.

        Caffe's weight decay and histories move those, too.
        """
        if not loss.requires_grad and not self._learned:
            return  # Only statistics move.
        if self._unreached is None:
            self._unreached = unreached(loss, [blob.tensor for blob in self._learned])
        for tensor in self._unreached:
            loss = loss + 0 * tensor.sum()
        loss.backward()

    def _watch(self, net: Net) -> Watch | None:
        """What a pass through a net is to be told to, if the solver asks for that."""
        return Watch(net, self._say) if self.solver.debug_info and self._first else None

    def _alone(self, alone: bool) -> AbstractContextManager[None]:
        """Where backward passes only add to this rank's gradients, if that is wanted."""
        return self.handle.no_sync() if alone and self.handle is not None else nullcontext()

    def _show(self, outputs: dict[str, Tensor]) -> None:
        rate, lapse_s = self._pace.lap(self.iteration)
        self._say(
            f"Iteration {self.iteration} ({rate:g} iter/s, {lapse_s:g}s/{self.solver.display} "
            f"iters), loss = {self._smoothed.value:g}"
        )
        for line in log.outputs("Train", self.net, outputs):
            self._say(line)

    def _update(self, *, shown: bool) -> None:
        before = self.rate.step
        rate = self.rate.at(self.iteration)
        if self.solver.lr_policy == "multistep" and self.rate.step != before:
            self._say(f"MultiStep Status: Iteration {self.iteration}, step = {self.rate.step}")
        if shown:
            self._say(f"Iteration {self.iteration}, lr = {rate:g}")
        clip_scale = self._clip_scale()
        for group, blob in zip(self.optimizer.param_groups, self._learned, strict=False):
            group["lr"] = rate * (blob.lr_mult or 0)
            group["clip_scale"] = clip_scale
        self.optimizer.step()

    def apply(self) -> None:
        """Moves the weights by the gradients that are there."""
        self._update(shown=False)

    def _clip_scale(self) -> float:
        """By which gradients are multiplied so that their norm is not above what is allowed."""
        scale, norm = solvers.clip_scale(self.solver, [blob.tensor.grad for blob in self._learned])
        if norm is not None:
            self._say(
                f"Gradient clipping: scaling down gradients (L2 norm {norm:g} > "
                f"{self.solver.clip_gradients:g}) by scale factor {scale:g}"
            )
        return scale

    # What is done between iterations

    def test(self) -> None:
        """Tests every net to test, on the first rank, and says the means."""
        for number, net in enumerate(self.tests):
            self._say(f"Iteration {self.iteration}, Testing net (#{number})")
            batches = self.solver.test_iter[number]
            found = tested(
                net,
                batches,
                given_up=lambda: self._requests.stops,
                watch=partial(self._watch, net),
            )
            if found is None:
                self._say("Test interrupted.")
                return
            loss, means = found
            if self.solver.test_compute_loss:
                self._say(f"Test loss: {loss:g}")
            for line in log.outputs("Test", net, means):
                self._say(line)

    def close(self) -> None:
        """Ends what goes on between ranks and ahead; the net keeps its weights."""
        for net in (self.net, *self.tests):
            net.close()
        self._requests.close()
        if self.handle is not None:
            self.handle.detach()
            self.handle = None

    def save(self) -> None:
        """Writes weights and state, on the first rank."""
        if self._first:
            snapshots.save(
                self.solver, self.net, self.optimizer, self.iteration, self.rate.step, self._say
            )
