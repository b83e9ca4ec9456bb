"""Lets tests that were written for GPUs run without: their CUDA devices become the CPU."""

from __future__ import annotations

import types
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randint", "randn", "tensor", "zeros")


def stand_in(modules: list[types.ModuleType], *, gpus: int) -> None:
    """Makes ``torch`` in these modules one that has so many GPUs, all of them the CPU.

    ``tensor.cuda()``, ``tensor.to()`` and the same of modules are replaced everywhere.
    """
    for name in ("cuda", "to"):
        for cls in (Tensor, nn.Module):
            setattr(cls, name, _mapped(getattr(cls, name)) if name == "to" else _itself)
    like_torch = types.ModuleType("torch")
    like_torch.__getattr__ = lambda name: getattr(torch, name)  # type: ignore[method-assign]
    for name in _FACTORIES:
        setattr(like_torch, name, _mapped(getattr(torch, name)))
    like_torch.device = _device  # type: ignore[attr-defined]
    like_torch.cuda = _Cuda(gpus)  # type: ignore[attr-defined]
    for module in modules:
        module.torch = like_torch  # type: ignore[attr-defined]
        if hasattr(module, "TEST_CUDA"):
            module.TEST_CUDA = True


def without_device_ids(cls: type[DistributedDataParallel]) -> None:
    """Lets a ``DistributedDataParallel`` take ``device_ids`` for modules that are here now."""
    init = cls.__init__

    def on_cpu(
        self: Any, module: nn.Module, device_ids: Any = None, output_device: Any = None,
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        init(self, module, None, None, *args, **kwargs)

    cls.__init__ = on_cpu  # type: ignore[method-assign]


class _Cuda(types.ModuleType):
    """What the tests use of ``torch.cuda``."""

    def __init__(self, gpus: int) -> None:
        super().__init__("torch.cuda")
        self._gpus = gpus

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return self._gpus

    def current_device(self) -> str:
        return "cpu"

    def set_device(self, device: Any) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...

    def manual_seed(self, seed: int) -> None: ...

    def device(self, device: Any) -> Any:
        return nullcontext()

    def Stream(self, device: Any = None) -> Any:  # noqa: N802
        return nullcontext()

    def stream(self, stream: Any) -> Any:
        return nullcontext()


def _itself(self: Any, *_: Any, **__: Any) -> Any:
    return self


def _device(*given: Any) -> torch.device:
    return _on_cpu(given[0]) if _is_gpu(given[0]) else torch.device(*given)


def _is_gpu(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


def _on_cpu(value: Any) -> Any:
    number = isinstance(value, int) and not isinstance(value, bool)
    return torch.device("cpu") if number or _is_gpu(value) else value


def _mapped(function: Any) -> Any:
    """``function`` with devices replaced: the keyword, and for ``to`` the first argument."""
    is_to = function.__name__ == "to"

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if is_to and len(args) > 1:
            args = (args[0], _on_cpu(args[1]), *args[2:])
        return function(*args, **kwargs)

    return on_cpu
