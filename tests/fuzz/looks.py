"""Actions: everything that can be read is read; and how two readings are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuzz.arms import SHARDED
from fuzz.loops import SECTIONS, action
from fuzz.run import Run

UNREAD = "not to be read here"


@action("look", first=SECTIONS)
def look(run: Run, first: str) -> None:
    """Reads all, one kind first: what is read first may still be in flight."""
    order = sorted(SECTIONS, key=lambda name: name != first)
    run.seen.append((run.at, {name: _READ[name](run) for name in order}))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    return [_copy(one) for one in value] if isinstance(value, list | tuple) else value


def _kept(run: Run) -> Any:
    return _copy({name: read() for name, read in run.kept.items()}), _copy(run.kept_gradients)


def _parameters(run: Run) -> Any:
    return {
        name: (p.detach().clone(), p.requires_grad, p.stride())
        for name, p in run.model.named_parameters()
    }


def _gradients(run: Run) -> Any:
    if run.arm.name == SHARDED:  # between backward() and step() only
        return UNREAD
    return {name: _copy(p.grad) for name, p in run.model.named_parameters()}


def _buffers(run: Run) -> Any:
    return {name: _copy(b) for name, b in run.model.named_buffers()}


def _optimizer(run: Run) -> Any:
    names = {id(p): name for name, p in run.model.named_parameters()}
    groups = [
        {
            **{key: _copy(value) for key, value in group.items() if key != "params"},
            "params": [names.get(id(p), "of no module") for p in group["params"]],
        }
        for group in run.optimizer.param_groups
    ]
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    found: Any = UNREAD
    if run.arm.name == SHARDED and run.arm.handle is not None:
        if not run.has_orphans:  # torch's own state_dict() takes no such
            state = run.arm.handle.optimizer_state_dict()["state"]
            found = {i: _copy(state[i]) for i in range(len(held)) if state.get(i)}
    else:
        state = run.optimizer.state
        found = {i: _copy(state[p]) for i, p in enumerate(held) if state.get(p)}
    return {"groups": groups, "state": found}


def _outputs(run: Run) -> Any:
    outputs, run.outputs = run.outputs, []
    return _copy(outputs)


_READ = {
    "kept": _kept,
    "parameters": _parameters,
    "gradients": _gradients,
    "buffers": _buffers,
    "optimizer": _optimizer,
    "outputs": _outputs,
}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two readings differ, in any bit but those of what is no number.

    The second may lack what is not to be read there.
    """
    if isinstance(b, str) and b == UNREAD:
        return []
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.layout != b.layout or a.dtype != b.dtype or a.shape != b.shape:
            return [f"{path}: {_described(a)} / {_described(b)}"]
        a, b = (x.to_dense() if x.layout is not torch.strided else x for x in (a, b))
        if torch.equal(a, b) or torch.allclose(a, b, 0.0, 0.0, equal_nan=True):
            return []
        gap = (a.double() - b.double()).abs().max().item()
        return [f"{path} by {gap:.3g}"]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a))} / {sorted(map(str, b))}"]
        return [text for key in a for text in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} / {len(b)} of them"]
        pairs = enumerate(zip(a, b, strict=True))
        return [text for i, (x, y) in pairs for text in differences(x, y, f"{path}[{i}]")]
    if isinstance(a, float) and isinstance(b, float) and a != a and b != b:
        return []
    return [] if a is b or a == b else [f"{path}: {_described(a)} / {_described(b)}"]


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.layout} {value.dtype} {tuple(value.shape)}".replace("torch.", "")
    return repr(value)[:60]
