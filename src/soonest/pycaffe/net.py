"""pycaffe's ``Net``: layers run one by one, and everything between them can be seen and set."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soonest.caffe.io import prototxt, weights
from soonest.caffe.io.blobs import Array
from soonest.caffe.layers.inputs import MemoryData
from soonest.caffe.net import net
from soonest.caffe.net.trained import copy_weights, share_weights
from soonest.caffe.proto.message import Message
from soonest.caffe.solver import snapshots
from soonest.pycaffe.batches import batches
from soonest.pycaffe.blobs import LayerView, NetBlob
from soonest.pycaffe.shapes import inferred
from soonest.pycaffe.tape import Tape

TRAIN, TEST = 0, 1
_PHASES = ("TRAIN", "TEST")


class Net:
    """A net.

    Either of the forms of pycaffe: ``Net(network_file, phase, level, stages, weights)``, by
    keywords too, or the older ``Net(network_file, weights, phase)``.

    Attributes:
        blobs: by name, in the order in which layers give them.
        params: what each layer learns, by its name.
        inputs: blobs that scripts set.
        outputs: blobs that no layer reads.
        layers: in their order.
        layer_dict: the same by name.
        top_names: per layer, what it gives.
        bottom_names: per layer, what it reads.
    """

    def __init__(
        self,
        network_file: str,
        *more: Any,
        phase: int | None = None,
        weights: str | None = None,
        level: int = 0,
        stages: Sequence[str] | None = None,
    ) -> None:
        given = list(more)
        if given and isinstance(given[0], str | Path):
            weights = str(given.pop(0))
        for name in ("phase", "level", "stages", "weights"):
            if not given:
                break
            value = given.pop(0)
            if name == "phase":
                phase = value
            elif name == "level":
                level = value
            elif name == "stages":
                stages = value
            else:
                weights = value
        if phase not in (TRAIN, TEST):
            raise ValueError("give the phase: caffe.TRAIN or caffe.TEST")
        state = Message("NetState", phase=_PHASES[phase], level=level, stage=list(stages or ()))
        read = prototxt.read_net(network_file)
        self._hold(net.Net(read, _PHASES[phase], state=state, file=str(network_file)))
        if weights is not None:
            self.copy_from(weights)

    @classmethod
    def of(cls, made: net.Net) -> Net:
        """The view of a net that is there already, as of a solver."""
        new = cls.__new__(cls)
        Net._hold(new, made)
        return new

    def _hold(self, made: net.Net) -> None:
        self._net = made
        steps = made.steps
        self._steps = {step.layer.spec.name: number for number, step in enumerate(steps)}
        self.blobs: OrderedDict[str, NetBlob] = OrderedDict()
        for step in steps:
            for name, weight in zip(step.tops, step.weights, strict=True):
                blob = self.blobs.setdefault(name, NetBlob(made.shapes[name]))
                if weight:
                    blob.diff[...] = weight
        self._layer_names = [step.layer.spec.name for step in steps]
        self._blob_names = list(self.blobs)
        self.layers = [LayerView(step) for step in steps]
        self.layer_dict = OrderedDict(zip(self._layer_names, self.layers, strict=True))
        self.params = OrderedDict(
            (name, layer.blobs) for name, layer in self.layer_dict.items() if layer.blobs
        )
        self.top_names = OrderedDict((one.layer.spec.name, list(one.tops)) for one in steps)
        self.bottom_names = OrderedDict((one.layer.spec.name, list(one.bottoms)) for one in steps)
        self.inputs = [name for step in steps if step.layer.spec.type == "Input"
                       for name in step.tops]  # fmt: skip
        self.outputs = list(made.output_names)
        self.blob_loss_weights = OrderedDict((name, made.loss_weight(name)) for name in self.blobs)
        self._tape = Tape(steps, self.blobs)

    @property
    def runs(self) -> bool:
        """Whether it is being run itself, and not as the net of a solver."""
        return self._tape.runs

    @property
    def name(self) -> str:
        return self._net.definition.name

    @property
    def phase(self) -> int:
        return _PHASES.index(self._net.phase)

    # Forward

    def forward(
        self,
        blobs: Sequence[str] | None = None,
        start: str | None = None,
        end: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Runs layers, all or from one to another.

        Args:
            blobs: which to return besides the outputs.
            start: the first layer; what it reads stays as it is.
            end: the last one, whose tops are returned instead of the outputs.
            kwargs: arrays to set inputs to.

        Returns:
            Views of the blobs, by name.
        """
        if kwargs:
            if set(kwargs) != set(self.inputs):
                raise ValueError(
                    f"the net has the inputs {self.inputs}, but arrays are given for "
                    f"{sorted(kwargs)}: give one for each"
                )
            for name, array in kwargs.items():
                blob = self.blobs[name]
                if len(array) != len(blob.data):
                    raise ValueError(
                        f"input {name!r} has {len(blob.data)} items, the array for it "
                        f"{len(array)}: reshape one of them"
                    )
                blob.data[...] = array
        first, last = self._between(start, end)
        for number in range(first, last + 1):
            self._tape.run(number)
        wanted = self.outputs if end is None else self.top_names[end]
        return {name: self.blobs[name].data for name in dict.fromkeys([*wanted, *(blobs or ())])}

    def _between(self, start: str | None, end: str | None) -> tuple[int, int]:
        for name in (start, end):
            if name is not None and name not in self._steps:
                raise ValueError(
                    f"the net has no layer {name!r}: it has {', '.join(self._layer_names)}"
                )
        first = 0 if start is None else self._steps[start]
        return first, len(self._layer_names) - 1 if end is None else self._steps[end]

    def reshape(self) -> None:
        """Gives blobs the shapes that follow from those of the inputs, before any pass."""
        for step in self._net.steps:
            if not step.bottoms:
                continue
            shapes = [self.blobs[name].shape for name in step.bottoms]
            for name, shape in zip(step.tops, inferred(step, shapes), strict=True):
                self.blobs[name].reshape(*shape)

    # Backward

    def backward(
        self,
        diffs: Sequence[str] | None = None,
        start: str | None = None,
        end: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Goes back through the layers of the last forward pass, all or from one to another.

        Diffs of what layers learn add up, as in Caffe, until something clears them.

        Args:
            diffs: whose diffs to return besides those of the inputs.
            start: the first layer of the way back; the diffs of its tops are taken as they are.
            end: the last one, the diffs of whose bottoms are returned instead of the inputs'.
            kwargs: arrays to set diffs of outputs to.

        Returns:
            Views of the diffs, by name.
        """
        if kwargs:
            tops = self.outputs if start is None else self.top_names[start]
            if not set(kwargs) <= set(tops):
                raise ValueError(f"diffs are given for {sorted(kwargs)}, not for some of {tops}")
            for name, array in kwargs.items():
                self.blobs[name].diff[...] = array
        self._between(start, end)
        last = len(self._layer_names) - 1 if start is None else self._steps[start]
        self._tape.go_back(last, 0 if end is None else self._steps[end])
        wanted = self.inputs if end is None else self.bottom_names[end]
        return {name: self.blobs[name].diff for name in dict.fromkeys([*wanted, *(diffs or ())])}

    def clear_param_diffs(self) -> None:
        """Sets the diffs of everything that layers learn to zero."""
        for layer in self.layers:
            for blob in layer.blobs:
                blob.diff[...] = 0

    # Many at once

    def forward_all(self, blobs: Sequence[str] | None = None, **kwargs: Any) -> dict[str, Array]:
        """Runs as many items as there are, a batch at a time; see ``forward``."""
        found: dict[str, list[Array]] = {}
        for batch in batches(kwargs, self._batch_size(kwargs)):
            for name, array in self.forward(blobs, **batch).items():
                found.setdefault(name, []).extend(array.copy())
        count = len(next(iter(kwargs.values())))
        return {name: np.asarray(arrays)[:count] for name, arrays in found.items()}

    def forward_backward_all(
        self,
        blobs: Sequence[str] | None = None,
        diffs: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Runs items forward and back, a batch at a time; diffs of outputs are by their names."""
        outs: dict[str, list[Array]] = {}
        backs: dict[str, list[Array]] = {}
        inputs = {name: kwargs[name] for name in self.inputs if name in kwargs}
        rest = {name: kwargs[name] for name in self.outputs if name in kwargs}
        size = self._batch_size(inputs)
        for fed, sent in zip_longest(batches(inputs, size), batches(rest, size), fillvalue={}):
            for name, array in self.forward(blobs, **fed).items():
                outs.setdefault(name, []).extend(array.copy())
            for name, array in self.backward(diffs, **sent).items():
                backs.setdefault(name, []).extend(array.copy())
        count = len(next(iter(inputs.values())))
        return (
            {name: np.asarray(arrays)[:count] for name, arrays in outs.items()},
            {name: np.asarray(arrays)[:count] for name, arrays in backs.items()},
        )

    def _batch_size(self, arrays: dict[str, Array]) -> int:
        return self.blobs[next(iter(arrays))].shape[0] if arrays else 1

    # Weights and data

    def copy_from(self, source: str | Net) -> None:
        """Copies weights of a file or of another net into layers of the same name."""
        if isinstance(source, Net):
            stored = {
                name: {number: blob.data for number, blob in enumerate(blobs)}
                for name, blobs in source.params.items()
            }
            copy_weights(self._net, stored, file="the other net")
        else:
            copy_weights(self._net, weights.read(source), file=str(source))

    def share_with(self, other: Net) -> None:
        """Uses the weights of another net, in layers of the same name."""
        share_weights(other._net, self._net)

    def save(self, filename: str) -> None:
        """Writes the weights, as HDF5 if the name ends so."""
        if str(filename).endswith(".h5"):
            self.save_hdf5(filename)
        else:
            weights.write_message(filename, self._net.to_message())

    def save_hdf5(self, filename: str, write_diff: bool = False) -> None:
        """Writes the weights as HDF5."""
        weights.write_hdf5(filename, *snapshots.tables(self._net, with_diff=write_diff))

    def load_hdf5(self, filename: str) -> None:
        """Copies weights of an HDF5 file; see ``copy_from``."""
        self.copy_from(filename)

    def set_input_arrays(self, data: Array, labels: Array) -> None:
        """Gives a MemoryData layer at the start of the net its items."""
        layer = self._net.steps[0].layer
        if not isinstance(layer, MemoryData):
            raise ValueError("set_input_arrays needs a net whose first layer is MemoryData")
        layer.put(torch.tensor(np.asarray(data)), torch.tensor(np.asarray(labels)))

    def set_layer_arrays(self, names: Iterable[str]) -> None:
        """Nothing has to be done so that arrays are views."""
