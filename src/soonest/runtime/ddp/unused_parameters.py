"""Checks which parameters the backward passes of a ``DistributedDataParallel`` use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._C import _distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]

from soonest.runtime.ddp import logger
from soonest.runtime.engine.engine import Engine
from soonest.runtime.flat.param import FlatParam


class UnusedParameterCheck:
    """Notes which parameters got gradients, and raises torch's own errors where they had to.

    Args:
        index_of: by name of the parameter, its place among all.
        log: takes note of errors.

    Attributes:
        static: all passes must use the same parameters.
        engine: that reduces gradients, if there is one.
        missing: places of the parameters that got no gradient in the last pass on this rank.
        first_missing: the same in the first pass; None before.
        alike: these were the same in all passes.
        changed: a pass has used other parameters than the first, though ``static``.
        futures: to wait for at the end of the next backward pass.
    """

    def __init__(self, index_of: Mapping[str, int], log: logger.Log) -> None:
        self._index_of = index_of
        self._log = log
        self.static = False
        self.engine: Engine | None = None
        self.missing: list[int] = []
        self.first_missing: list[int] | None = None
        self.alike = True
        self.changed = False
        self.futures: list[torch.futures.Future[Any]] = []

    def expect(self, *_: Any) -> None:
        """Lets the backward pass that follows be reduced."""
        if self.engine is not None:
            self.engine.backward.synchronizing = True

    def ended(self, engine: Engine, late: Sequence[FlatParam]) -> None:
        """Takes in a backward pass that was reduced, and the parameters without gradient in it."""
        engine.backward.synchronizing = False
        self.missing = sorted(self._index_of[param.name] for param in late)
        if self.first_missing is None:
            self.first_missing = self.missing
        self.alike = self.alike and self.missing == self.first_missing
        for future in self.futures:
            future.wait()
        self.futures = []
        used_now = set(self.first_missing) - set(self.missing)
        if self.static and used_now:
            self.changed = True
            error = (
                "Your training graph has changed in this iteration, e.g., one parameter is unused "
                "in first iteration, but then got used in the second iteration: this is not "
                "compatible with static_graph set to True"
            )
            self._log.set_error_and_log(error)
            raise RuntimeError(error)

    def make_static(self, *, begun: bool) -> None:
        """Lets all passes have to use the same parameters.

        Args:
            begun: there has been one.

        Raises:
            RuntimeError: it is too late for that.
        """
        if begun:
            error = (
                "set_static_graph() should be called before training loop starts and after "
                "DistributedDataParallel is constructed"
            )
            self._log.set_error_and_log(error)
            raise RuntimeError(error)
        self.static = True

    def check(self, *, find_unused: bool, rank: int) -> None:
        """Raises RuntimeError if a parameter got no gradient that had to have one.

        Args:
            find_unused: none has to.
            rank: this one, for the message.
        """
        unfinished = bool(self.missing) and not find_unused
        if self.static:
            unfinished = self.changed or set(self.missing) > set(self.first_missing or ())
        if unfinished:
            error = self._unfinished(rank)
            self._log.set_error_and_log(error)
            raise RuntimeError(error)

    def _unfinished(self, rank: int) -> str:
        """The error in the words of torch's class, by which people and tools know it."""
        missing = self.missing
        if self.static:
            why = (
                "This error indicates that your training graph has changed in this iteration, "
                "e.g., one parameter is used in first iteration, but then got unused in the second "
                "iteration. this is not compatible with static_graph set to True."
            )
        else:
            why = (
                "This error indicates that your module has parameters that were not used in "
                "producing loss. You can enable unused parameter detection by passing the keyword "
                "argument `find_unused_parameters=True` to `DistributedDataParallel`, and by "
                "making sure all `forward` function outputs participate in calculating loss."
            )
        indices = " ".join(str(index) for index in missing)
        if _distributed_c10d.get_debug_level() == _distributed_c10d.DebugLevel.OFF:
            more = (
                " In addition, you can set the environment variable TORCH_DISTRIBUTED_DEBUG to "
                "either INFO or DETAIL to print out information about which particular parameters "
                "did not receive gradient on this rank as part of this error"
            )
        else:
            names = list(self._index_of)
            named = ", ".join(names[index] for index in missing)
            more = f"\nParameters which did not receive grad for rank {rank}: {named}"
        return (
            "Expected to have finished reduction in the prior iteration before starting a new "
            f"one. {why}\nParameter indices which did not receive grad for rank {rank}: "
            f"{indices}{more}"
        )
