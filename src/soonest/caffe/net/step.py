"""A layer at its place in a net: what it reads and writes, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from soonest.caffe.layers.base import Layer, Shape


@dataclass(frozen=True)
class Step:
    """A layer in its place.

    Attributes:
        layer: the module.
        bottoms: names of what it reads.
        tops: names of what it writes; the same name as a bottom means that it replaces it.
        weights: with which its tops count in the loss.
        stops: which bottoms get no gradient.
        place: of its definition, for errors.
        shapes: of its bottoms, for which it was made; later ones may have others.
    """

    layer: Layer
    bottoms: list[str]
    tops: list[str]
    weights: list[float]
    stops: list[bool]
    place: str
    shapes: list[Shape]

    def run(self, bottoms: list[Tensor]) -> list[Tensor]:
        """Its tops.

        Raises:
            ValueError: bottoms have shapes that it cannot take.
        """
        shapes = [tuple(bottom.shape) for bottom in bottoms]
        try:
            return listed(self.layer(*bottoms))
        except (IndexError, RuntimeError) as error:
            if shapes == self.shapes:
                raise
            raise unfit(shapes, error) from error

    def fed(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """The tops of a layer that a program feeds, taken out of what it gives.

        Args:
            inputs: by name; those of this layer are removed.
        """
        given = {name: inputs.pop(name) for name in self.tops if name in inputs}
        if len(given) == len(self.tops):
            return [given[name] for name in self.tops]
        own = zip(self.tops, listed(self.layer()), strict=True)
        return [given.get(name, top) for name, top in own]


def unfit(shapes: list[Shape], error: Exception) -> ValueError:
    """Says that a layer cannot take bottoms of some shapes, and why."""
    given = [list(shape) for shape in shapes]
    return ValueError(f"it cannot take bottoms of the shapes {given}: {error}")


def listed(tops: Tensor | tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """What a layer returned, as a list however many tops it has."""
    return [tops] if isinstance(tops, Tensor) else list(tops)
