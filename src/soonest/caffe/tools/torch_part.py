"""A layer on its way to plain torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from soonest.caffe.layers.base import Shape
from soonest.caffe.proto.message import Message


@dataclass
class Part:
    """A layer on its way to torch.

    Attributes:
        layer: as we have it, with its weights.
        spec: its ``LayerParameter``.
        name: of its attribute in the module.
        bottoms: the variables that it reads.
        shapes: of these.
        modules: what the module makes at its start, by attribute.
        state: tensors of the module's state.
        owners: per name in that, which of the layer's own tensors it is, by identity, if it is one.
    """

    layer: Any
    spec: Message
    name: str
    bottoms: list[str]
    shapes: list[Shape]
    modules: dict[str, str] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)

    @property
    def x(self) -> str:
        return self.bottoms[0]

    def module(self, made: str, **state: Tensor | None) -> str:
        """Gives the module a part with these tensors, and calls it."""
        self.modules[self.name] = made
        self.keep(f"{self.name}.", state)
        return f"self.{self.name}"

    def parameter(self, suffix: str, value: Tensor) -> str:
        """Gives the module a parameter of its own."""
        name = f"{self.name}_{suffix}"
        self.modules[name] = f"nn.Parameter(torch.empty({tuple(value.shape)}))"
        self.keep("", {name: value})
        return f"self.{name}"

    def keep(self, prefix: str, state: dict[str, Tensor | None]) -> None:
        for key, value in state.items():
            if value is not None:
                self.state[prefix + key] = value.detach().clone()
                if any(value is blob for blob in self.layer.blobs()):
                    self.owners[prefix + key] = id(value)
