"""Layers of a model: how large they are and how long they compute."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

_SHIPPED = resources.files("soonest") / "data" / "traces"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a model, in the order of the forward pass.

    Args:
        name: unique within its trace.
        bytes: size of its parameters (and so of its gradients).
        fwd_us: time of its forward computation, microseconds.
        bwd_us: time of its backward computation, microseconds.
    """

    name: str
    bytes: int
    fwd_us: float
    bwd_us: float

    def __post_init__(self) -> None:
        for label in ("bytes", "fwd_us", "bwd_us"):
            if not getattr(self, label) >= 0:
                raise ValueError(
                    f"layer {self.name!r}: {label} is {getattr(self, label)!r}, "
                    "but must be zero or more"
                )


@dataclass(frozen=True)
class Trace:
    """The layers of a model with their sizes and times, first-used layer first.

    Args:
        model: a name to show.
        layers: at least one.
        update_us: time in which one rank updates all parameters, microseconds.
        info: whatever else the file says (device, batch size, source).
    """

    model: str
    layers: tuple[Layer, ...]
    update_us: float = 0.0
    info: dict[str, Any] = field(default_factory=dict[str, Any], compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(f"trace {self.model!r} has no layers: give it at least one")
        names = [layer.name for layer in self.layers]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"trace {self.model!r} names layer {twice!r} twice: names are unique")

    @property
    def total_bytes(self) -> int:
        """Size of all parameters."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def forward_s(self) -> float:
        """How long the forward pass of all layers computes."""
        return sum(layer.fwd_us for layer in self.layers) * 1e-6

    @property
    def backward_s(self) -> float:
        """How long the backward pass of all layers computes."""
        return sum(layer.bwd_us for layer in self.layers) * 1e-6

    def ready_s(self) -> list[float]:
        """Per layer, when its gradient is ready, in seconds after the backward pass began."""
        ready, now = [0.0] * len(self.layers), 0.0
        for index in range(len(self.layers) - 1, -1, -1):
            now += self.layers[index].bwd_us * 1e-6
            ready[index] = now
        return ready

    def tail_s(self) -> list[float]:
        """Per layer, the forward computation still to do once its parameters are there, seconds.

        That is its own forward and that of all layers behind it.
        """
        tail, later = [0.0] * len(self.layers), 0.0
        for index in range(len(self.layers) - 1, -1, -1):
            later += self.layers[index].fwd_us * 1e-6
            tail[index] = later
        return tail

    def to_json(self) -> dict[str, Any]:
        layers = [asdict(layer) for layer in self.layers]
        return {**self.info, "model": self.model, "update_us": self.update_us, "layers": layers}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trace:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: a field is missing or of the wrong kind; the message names it.
        """
        try:
            layers = tuple(
                Layer(
                    name=str(layer["name"]),
                    bytes=int(layer["bytes"]),
                    fwd_us=float(layer["fwd_us"]),
                    bwd_us=float(layer["bwd_us"]),
                )
                for layer in data["layers"]
            )
            info = {k: v for k, v in data.items() if k not in ("model", "layers", "update_us")}
            return cls(str(data["model"]), layers, float(data.get("update_us", 0.0)), info)
        except KeyError as missing:
            raise ValueError(
                f"this is no trace: {missing} is missing (a trace has 'model' and 'layers', "
                "each with 'name', 'bytes', 'fwd_us' and 'bwd_us')"
            ) from None
        except TypeError as wrong:
            raise ValueError(f"this is no trace: {wrong}") from None

    @staticmethod
    def shipped() -> list[str]:
        """Names of the traces that come with the package."""
        names = (entry.name for entry in _SHIPPED.iterdir())
        return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))

    @classmethod
    def load(cls, name_or_path: str | Path) -> Trace:
        """Loads a trace that ships with the package, by name, or any other, by path.

        Raises:
            ValueError: there is no such trace, or the file is none.
        """
        name = str(name_or_path)
        source = _SHIPPED / f"{name}.json" if name in cls.shipped() else Path(name_or_path)
        try:
            text = source.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"no trace {name!r} ({error.strerror}): give one of {', '.join(cls.shipped())}, "
                "or the path of a JSON file"
            ) from None
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: not JSON ({error})") from None
        if not isinstance(data, dict):
            raise ValueError(f"{name}: a trace is a JSON object, this is a {type(data).__name__}")
        return cls.from_json(data)
