"""pycaffe's solvers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from soonest.caffe.io import prototxt
from soonest.caffe.net.step import listed
from soonest.caffe.proto.message import Message
from soonest.caffe.solver.training import Trainer
from soonest.pycaffe.net import Net


class Solver:
    """Trains the net of a solver's prototxt.

    Attributes:
        net: that is trained.
        test_nets: those that are tested; they use the weights of ``net``.
        param: what the prototxt says, as a message.
    """

    _type: str | None = None

    def __init__(self, solver_file: str) -> None:
        self.param = prototxt.read_solver(solver_file)
        if self._type:
            self.param.type = self._type
        _name_snapshots(self.param, Path(solver_file))
        self._trainer = Trainer(self.param)
        self.net = Net.of(self._trainer.net)
        self.test_nets = [Net.of(one) for one in self._trainer.tests]
        for view in (self.net, *self.test_nets):
            _watch(view)
        self._callbacks: list[tuple[Callable[[], Any], Callable[[], Any]]] = []

    @property
    def iter(self) -> int:
        """How many iterations are done."""
        return self._trainer.iteration

    @property
    def lr(self) -> float:
        """The rate of the next iteration."""
        return self._trainer.rate.at(self.iter)

    def step(self, iterations: int) -> None:
        """Trains for so many iterations, with tests and snapshots when they are due."""
        if not self._callbacks:
            self._trainer.run(iterations)
            return
        for _ in range(iterations):
            for before, _after in self._callbacks:
                before()
            self._trainer.run(1)

    def solve(self, resume_file: str | None = None) -> None:
        """Trains to the end.

        Args:
            resume_file: a ``.solverstate`` to go on from.
        """
        if resume_file:
            self.restore(resume_file)
        self._trainer.solve()

    def restore(self, filename: str) -> None:
        """Goes on from a state."""
        self._trainer.resume(filename)

    def snapshot(self) -> None:
        """Writes weights and state, named after ``snapshot_prefix`` and the iteration."""
        self._trainer.save()

    def apply_update(self) -> None:
        """Moves the weights by the diffs that are there."""
        self._trainer.apply()

    def share_weights(self, net: Net) -> None:
        """Lets a net use the weights of the one that is trained."""
        net.share_with(self.net)

    def add_callback(self, on_start: Callable[[], Any], on_gradients_ready: Callable[[], Any]
                     ) -> None:  # fmt: skip
        """Calls functions in every iteration: before it, and once its gradients are there."""
        self._callbacks.append((on_start, on_gradients_ready))
        self._trainer.optimizer.register_step_pre_hook(lambda *_: on_gradients_ready())


class SGDSolver(Solver):
    """Solves by stochastic gradient descent with momentum."""

    _type = "SGD"


class NesterovSolver(Solver):
    """Solves by Nesterov's momentum."""

    _type = "Nesterov"


class AdaGradSolver(Solver):
    """Solves by AdaGrad."""

    _type = "AdaGrad"


class RMSPropSolver(Solver):
    """Solves by RMSProp."""

    _type = "RMSProp"


class AdaDeltaSolver(Solver):
    """Solves by AdaDelta."""

    _type = "AdaDelta"


class AdamSolver(Solver):
    """Solves by Adam."""

    _type = "Adam"


def get_solver(solver_file: str) -> Solver:
    """The solver of a prototxt, of the type that it says."""
    wanted = prototxt.read_solver(solver_file).type
    for class_ in Solver.__subclasses__():
        if class_._type == wanted:
            return class_(solver_file)
    raise ValueError(f"{solver_file}: there is no solver of the type {wanted!r}")


def _name_snapshots(solver: Message, path: Path) -> None:
    """Without a prefix, or with one that is a folder, files are named like the solver."""
    if not solver.has("snapshot_prefix"):
        solver.snapshot_prefix = str(path.with_suffix(""))
    elif Path(solver.snapshot_prefix).is_dir():
        solver.snapshot_prefix = str(Path(solver.snapshot_prefix) / path.stem)


def _watch(view: Net) -> None:
    """Lets a view show what its net's layers have given in the last pass of a solver."""
    for step in view._net.steps:

        def seen(_layer: nn.Module, _args: Any, tops: Any, step: Any = step) -> None:
            for name, top in zip(step.tops, () if view.runs else listed(tops), strict=False):
                if top.requires_grad:
                    top.retain_grad()
                view.blobs[name].see(top, anew=name not in step.bottoms)

        step.layer.register_forward_hook(seen)
