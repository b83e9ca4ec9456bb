"""A net as a module of torch, made from its definition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from soonest.caffe.data.records import RecordLayer
from soonest.caffe.io.blobs import to_blob
from soonest.caffe.layers.base import Layer, Shape, check_shape, gradient
from soonest.caffe.layers.inputs import Fed
from soonest.caffe.net import rules
from soonest.caffe.net.debug import Watch
from soonest.caffe.net.registry import LAYERS
from soonest.caffe.net.sharing import Blob, Sharing
from soonest.caffe.net.step import Step, listed, unfit
from soonest.caffe.proto.message import Message


class Result(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: the weighted sum of all losses; zero if there are none.
        outputs: blobs that no layer reads, by name in alphabetical order, as Caffe prints them.
        blobs: all, if they were asked for.
    """

    loss: Tensor
    outputs: dict[str, Tensor]
    blobs: dict[str, Tensor]


class Net(nn.Module):
    """A net.

    Args:
        definition: a ``NetParameter`` in today's form.
        phase: ``TRAIN`` or ``TEST``.
        state: level and stages, and a phase that goes before ``phase``; by default those of the
            definition.
        file: the name of the definition, for errors.
        generator: of random numbers for the fillers.
        rank: of this process, which reads its share of the records.
        ranks: how many read.
        divide: whether batches are those of all ranks, not of each.

    Raises:
        ValueError: it cannot be made; the error names the layer and its line.
    """

    def __init__(
        self,
        definition: Message,
        phase: str = "TEST",
        *,
        state: Message | None = None,
        file: str = "",
        generator: torch.Generator | None = None,
        rank: int = 0,
        ranks: int = 1,
        divide: bool = False,
    ) -> None:
        super().__init__()
        self.definition = definition
        self.file = file
        self.state = _state(definition, phase, state)
        self.phase = self.state.phase
        self.steps: list[Step] = []
        self.layers = nn.ModuleDict()
        self.shapes: dict[str, Shape] = {}
        self._share, self._divide = (rank, ranks), divide
        sharing = Sharing()
        made: dict[str, Tensor] = {}
        unread: set[str] = set()
        for spec in rules.chosen(definition, self.state):
            with _placed(self._place(spec)):
                self._append(spec, made, unread, sharing)
        self.output_names = sorted(unread)
        self.stored = sharing.fill(
            generator or torch.default_generator, all_learn=definition.force_backward
        )
        """Every blob once, in the order of the layers: what solvers keep a history of."""

    def _place(self, spec: Message) -> str:
        line = f":{spec.line}" if spec.line else ""
        kind = f" of type {spec.type!r}" if spec.type else ""
        return f"{self.file or 'net'}{line}: layer {spec.name!r}{kind}"

    def _append(
        self, spec: Message, made: dict[str, Tensor], unread: set[str], sharing: Sharing
    ) -> None:
        if spec.type not in LAYERS:
            raise ValueError(f"Caffe has no such type: it has {', '.join(sorted(LAYERS))}")
        class_ = LAYERS[spec.type]
        bottoms, tops = list(spec.bottom), list(spec.top)
        for number, name in enumerate(bottoms):
            if name not in made:
                raise ValueError(f"its bottom {number} is {name!r}, which no layer before it makes")
            unread.discard(name)
        if class_.is_loss and not tops:
            tops = [f"(automatic) {spec.name}"]
            spec = _with(spec, top=tops)
        for number, name in enumerate(tops):
            in_place = number < len(bottoms) and bottoms[number] == name
            if (name in made and not in_place) or name in tops[:number]:
                raise ValueError(f"its top {name!r} is made by another layer already: rename it")
        weights = _loss_weights(spec, class_, tops)
        shapes = [tuple(made[name].shape) for name in bottoms]
        try:
            with torch.device("meta"), torch.no_grad():
                layer = class_(spec, shapes, self.phase)
                layer.share(*self._share, divide=self._divide)
                results = listed(layer.infer(*(made[name] for name in bottoms)))
        except (IndexError, RuntimeError) as error:
            raise unfit(shapes, error) from error
        for name, result in zip(tops, results, strict=True):
            check_shape(result.shape, f"top {name!r}")
        if spec.has("propagate_down") and len(spec.propagate_down) != len(bottoms):
            raise ValueError("propagate_down must be given once for each bottom, or not at all")
        stops = [not one for one in spec.propagate_down] or [False] * len(bottoms)
        if self.definition.force_backward:
            stops = [False] * len(bottoms)
        made.update(zip(tops, results, strict=True))
        self.shapes.update({name: tuple(made[name].shape) for name in tops})
        unread.update(tops)
        sharing.add(layer)
        self.layers[_key(spec.name, self.layers)] = layer
        self.steps.append(Step(layer, bottoms, tops, weights, stops, self._place(spec), shapes))

    def forward(
        self,
        inputs: Mapping[str, Tensor] | None = None,
        *,
        keep: bool = False,
        watch: Watch | None = None,
    ) -> Result:
        """Runs the net.

        Args:
            inputs: what replaces tops of Input and MemoryData layers, by name.
            keep: whether to return all blobs, not only the outputs.
            watch: is told of all that is read and given.

        Raises:
            ValueError: an input has no such name, or data are wrong; the error names the layer.
        """
        inputs = dict(inputs or {})
        blobs: dict[str, Tensor] = {}
        total = torch.zeros(())
        for step in self.steps:
            read = [
                blobs[name].detach() if stop else blobs[name]
                for name, stop in zip(step.bottoms, step.stops, strict=True)
            ]
            read = watch.reads(read) if watch else read
            with _placed(step.place):
                tops = step.fed(inputs) if isinstance(step.layer, Fed) else step.run(read)
            if not read and self.definition.force_backward and torch.is_grad_enabled():
                tops = [top if top.requires_grad else top.detach().requires_grad_() for top in tops]
            if watch:
                watch.gives(tops)
            for name, top, weight in zip(step.tops, tops, step.weights, strict=True):
                blobs[name] = top
                if weight:
                    total = total + weight * top.sum()
        if inputs:
            raise ValueError(f"the net has no input {next(iter(inputs))!r}")
        return Result(
            total, {name: blobs[name] for name in self.output_names}, blobs if keep else {}
        )

    def close(self) -> None:
        """Stops reading ahead; the net stays as it is, but its data start again."""
        for step in self.steps:
            if isinstance(step.layer, RecordLayer):
                step.layer.close()

    def repeated_names(self) -> list[str]:
        """Names that several layers with blobs have, whose weights files cannot tell apart."""
        names = [step.layer.spec.name for step in self.steps if step.layer.blob_names]
        return [name for name, count in Counter(names).items() if count > 1]

    def loss_weight(self, name: str) -> float:
        """With which weight a blob counts in the loss, by its last layer."""
        for step in reversed(self.steps):
            if name in step.tops:
                return step.weights[step.tops.index(name)]
        raise ValueError(f"the net has no blob {name!r}")

    def to_message(self, *, with_diff: bool = False) -> Message:
        """The net with its weights as a ``NetParameter``, as a ``.caffemodel`` has it.

        Args:
            with_diff: whether gradients are in it, too.
        """
        message = Message("NetParameter", name=self.definition.name)
        for step in self.steps:
            spec = _with(step.layer.spec, phase=self.phase)
            spec.blobs = [
                to_blob(
                    blob.detach().numpy(),
                    found.numpy() if with_diff and (found := gradient(blob)) is not None else None,
                )
                for blob in step.layer.blobs()
            ]
            if step.layer.is_loss and not spec.has("loss_weight"):
                spec.loss_weight = step.weights
            message.layer.append(spec)
        return message


def _state(definition: Message, phase: str, given: Message | None) -> Message:
    """The state of the definition, with what is given instead of what it says."""
    state = Message("NetState", phase=phase)
    for one in (definition.state, given):
        if one is not None:
            for name in ("level", "stage", *(("phase",) if one is given else ())):
                if one.has(name):
                    setattr(state, name, getattr(one, name))
    return state


def _loss_weights(spec: Message, class_: type[Layer], tops: list[str]) -> list[float]:
    if spec.has("loss_weight"):
        if len(spec.loss_weight) != len(tops):
            raise ValueError(
                f"it has {len(tops)} tops and {len(spec.loss_weight)} loss_weight: give one for "
                "each top, or none"
            )
        return [float(weight) for weight in spec.loss_weight]
    return [1.0 if class_.is_loss and number == 0 else 0.0 for number in range(len(tops))]


def _with(spec: Message, **values: object) -> Message:
    new = Message(spec.schema)
    new.line = spec.line
    new.values.update(spec.values)
    for name, value in values.items():
        setattr(new, name, value)
    return new


def _key(name: str, taken: nn.ModuleDict) -> str:
    """A name as torch allows it."""
    key = name.replace(".", "_") or "unnamed"
    while key in taken or hasattr(taken, key):
        key += "_"
    return key


@contextmanager
def _placed(place: str) -> Iterator[None]:
    """Errors inside say where the layer stands."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


__all__ = ["Blob", "Net", "Result", "Step"]
