"""Looks into plain DistributedDataParallel: one of its steps as a timeline."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from soonest.core.timeline import Span, Timeline
from soonest.runtime.flat.buffers import trainable

_now_s = time.perf_counter


class DdpObserver:
    """Records the steps of a training that goes on as usual.

    It becomes DDP's communication hook, which cannot be given back, so use it once everything else
    has been measured. What is sent, and the results, stay the same.

    Args:
        ddp: the wrapped model.
        optimizer: of the same training.
        title: of the timelines.
    """

    def __init__(
        self, ddp: DistributedDataParallel, optimizer: Optimizer, *, title: str = "ddp"
    ) -> None:
        self._title = title
        self._group = ddp.process_group
        self._layer_of: dict[int, str] = {}
        self._last: Timeline | None = None
        self._step: _Step | None = None
        modules = dict(ddp.module.named_modules())
        hooks: list[Any] = []
        for _, layer, parameter in trainable(ddp.module):
            self._layer_of[id(parameter)] = layer
            hooks.append(parameter.register_post_accumulate_grad_hook(self._ready))
        hooks += [
            modules[layer].register_forward_pre_hook(partial(self._needed, layer))
            for layer in dict.fromkeys(self._layer_of.values())
        ]
        hooks.append(ddp.module.register_forward_hook(self._forward_ended))
        hooks.append(optimizer.register_step_pre_hook(self._update_began))
        hooks.append(optimizer.register_step_post_hook(self._update_ended))
        self._hooks = hooks
        ddp.register_comm_hook(None, self._reduce)

    def timeline(self) -> Timeline | None:
        """The last complete step; None before there is one."""
        return self._last

    def remove(self) -> None:
        """Stops recording."""
        for hook in self._hooks:
            hook.remove()
        self._step = None

    def _forward_ended(self, *_: object) -> None:
        """A step is from here to here: the backward pass begins."""
        if not torch.is_grad_enabled():
            return
        now = _now_s()
        if self._step is not None:
            self._last = self._step.timeline(self._title, now)
        self._step = _Step(now)

    def _ready(self, parameter: Tensor) -> None:
        if self._step is not None:
            self._step.ready[self._layer_of[id(parameter)]] = _now_s()

    def _reduce(self, _, bucket):  # Without types: DDP refuses those given as strings.
        """What DDP does without a hook, with the time taken when it begins and ends."""
        step, began = self._step, _now_s()
        index, size_mb = bucket.index(), bucket.buffer().nbytes / 1e6
        layers = [self._layer_of[id(parameter)] for parameter in bucket.parameters()]

        def ended(future: Future[Any]) -> Tensor:
            if step is not None:
                step.sent.append((index, size_mb, layers, began, _now_s()))
            return future.value()[0]

        buffer = bucket.buffer().div_(dist.get_world_size(self._group))
        work = dist.all_reduce(buffer, group=self._group, async_op=True)
        assert work is not None
        return work.get_future().then(ended)

    def _update_began(self, *_: object) -> None:
        if self._step is not None:
            self._step.update = (_now_s(), _now_s())

    def _update_ended(self, *_: object) -> None:
        if self._step is not None:
            self._step.update = (self._step.update[0], _now_s())

    def _needed(self, layer: str, *_: object) -> None:
        if self._step is not None and torch.is_grad_enabled():
            self._step.needed.setdefault(layer, _now_s())


class _Step:
    """When everything in one step happened.

    Args:
        began_s: when its backward pass began.
    """

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self.ready: dict[str, float] = {}
        self.sent: list[tuple[int, float, list[str], float, float]] = []
        self.update = (began_s, began_s)
        self.needed: dict[str, float] = {}

    def timeline(self, title: str, ended_s: float) -> Timeline:
        """The step, with each layer computing from when the one before it was done."""
        spans: list[Span] = []

        def add(track: Any, kind: Any, name: str, start_s: float, end_s: float) -> None:
            zero = self.began_s
            spans.append(Span(track, kind, name, start_s - zero, max(start_s, end_s) - zero))

        reached = self.began_s
        for layer, at in sorted(self.ready.items(), key=lambda item: item[1]):
            add("compute", "backward", layer, reached, at)
            reached = at
        order = {layer: index for index, layer in enumerate(self.needed)}
        for index, size_mb, layers, began, ended in self.sent:
            named = ", ".join(sorted(dict.fromkeys(layers), key=lambda x: order.get(x, len(order))))
            add("network", "send", f"bucket {index} ({size_mb:.2f} MB of {named})", began, ended)
        reduced = max((ended for *_, ended in self.sent), default=reached)
        if reduced > reached:
            add("compute", "wait", "all gradients", reached, reduced)
        add("update", "update", "all", *self.update)
        starts = [*self.needed.values(), ended_s]
        for layer, start, end in zip(self.needed, starts, starts[1:], strict=False):
            add("compute", "forward", layer, start, end)
        return Timeline(title, ended_s - self.began_s, tuple(spans))
