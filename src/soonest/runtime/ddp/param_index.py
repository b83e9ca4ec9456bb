"""The places of parameters by which torch's ``DistributedDataParallel`` names them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from soonest.runtime.engine.engine import Engine
from soonest.runtime.flat.buffers import trainable


class ParamIndex:
    """Numbers a module's trainable parameters as they are registered.

    Args:
        module: whose.
        without: names of parameters that get no place.

    Attributes:
        of: by name of the parameter, its place.
    """

    def __init__(self, module: nn.Module, without: Collection[str] = ()) -> None:
        self._module = module
        self._sizes_bytes: list[int] = []
        self.of: dict[str, int] = {}
        self.update(without)

    def update(self, without: Collection[str]) -> None:
        """Gives parameters that have come to be trained places behind those before them.

        Args:
            without: names of parameters that get no place.
        """
        for name, _, parameter in trainable(self._module, without):
            if name not in self.of:
                self.of[name] = len(self._sizes_bytes)
                self._sizes_bytes.append(parameter.nbytes)

    def bytes_of(self, places: Iterable[int]) -> int:
        """The size of the parameters at some places together, bytes."""
        return sum(self._sizes_bytes[place] for place in places)

    def counts(self, engine: Engine | None) -> Tensor:
        """In how many ranks' last backward passes each parameter was used, int32, by place.

        Args:
            engine: which has reduced them; nothing was used if None.
        """
        counts = torch.zeros(len(self.of), dtype=torch.int32)
        if engine is not None:
            for param in engine.layout.params:
                counts[self.of[param.name]] = engine.bound_plan.usage.users_of(param)
        return counts
