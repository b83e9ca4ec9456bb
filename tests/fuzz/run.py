"""One loop under one way to train, on this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim import Optimizer

from fuzz import models, optimizers
from fuzz.arms import Arm
from fuzz.loops import ACTIONS, Loop

BATCH = 4


class Run:
    """What the actions of a loop work on.

    Args:
        loop: which.
        arm: how to train.

    Attributes:
        at: the number of the line.
        model, optimizer: the user's own.
        stepper: whose ``step`` is called: the optimizer, or what stands around it.
        seen: what has been read so far: the number of the line, and what was there.
        outputs: losses and what else forward passes have returned since the last look.
        kept: what the user keeps, by name.
        stale: other parameters have come to be trained; DDP is wrapped anew before the next pass.
        has_orphans: the optimizer may have states of parameters that it no longer holds.
        by_hand: gradients are averaged by hand now.
        memory: what actions keep for themselves.
        common: draws the same on all ranks.
    """

    def __init__(self, loop: Loop, arm: Arm) -> None:
        self.loop, self.arm = loop, arm
        self.at = -1
        self.rank = dist.get_rank()
        self.seen: list[tuple[int, Any]] = []
        self.outputs: list[Any] = []
        self.kept: dict[str, Callable[[], Any]] = {}
        self.kept_gradients: dict[str, Tensor] = {}
        self.memory: dict[str, Any] = {}
        self.stale = False
        self.unscaled = False
        self.has_orphans = False
        self.by_hand = False
        self.common = torch.Generator().manual_seed(loop.seed + 1)
        self._data = torch.Generator().manual_seed(2 * loop.seed + self.rank)
        apart = self.rank if loop.setting("apart") else 0
        torch.manual_seed(loop.seed + apart)
        self.model = models.MODELS[loop.model]()
        torch.manual_seed(loop.seed)
        if loop.setting("frozen"):
            self.layer(0).requires_grad_(False)
        self.set_optimizer(self.new_optimizer())
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
        if loop.setting("early"):
            self._make_scheduler()
        arm.wrap(self.model, self.optimizer)
        if not loop.setting("early"):
            self.step_before = self.optimizer.step
            self._make_scheduler()

    def new_optimizer(self) -> Optimizer:
        groups = optimizers.groups_of(self.model.parameters(), self.loop.groups)
        return optimizers.OPTIMIZERS[self.loop.optimizer](groups)

    def set_optimizer(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.step_before = optimizer.step
        self.stepper: Any = optimizer
        if self.loop.setting("around") == "lookahead":
            self.stepper = optimizers.Lookahead(optimizer)

    def _make_scheduler(self) -> None:
        name = self.loop.scheduler
        self.scheduler = optimizers.SCHEDULERS[name](self.optimizer) if name else None

    def train(self) -> None:
        """Does all that the lines say."""
        for self.at, line in enumerate(self.loop.lines):  # noqa: B020
            ACTIONS[line.name].call(self, **dict(line.arguments))

    # What actions pick from

    def layers(self) -> list[nn.Module]:
        return [
            m for m in self.model.modules() if any(p is not None for p in m._parameters.values())
        ]

    def layer(self, number: int) -> nn.Module:
        layers = self.layers()
        return layers[number % len(layers)]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def parameter(self, number: int) -> nn.Parameter:
        parameters = self.parameters()
        return parameters[number % len(parameters)]

    def drawn_like(self, tensor: Tensor) -> Tensor:
        """The same on all ranks."""
        return torch.randn(tensor.shape, generator=self.common).to(tensor.dtype)

    def inputs(self) -> Tensor:
        """Others on every rank."""
        return torch.randn(BATCH, models.FEATURES, generator=self._data)

    # Passes

    def task(self, task: int, by_rank: bool) -> int:
        return (task + self.rank) % 2 if by_rank else task

    def freshen(self) -> None:
        """Before whatever is done with the net."""
        if not self.stale:
            return
        self.stale = False
        buffers = [b.clone() for b in self.model.buffers()]
        sends = getattr(self.arm.net, "require_forward_param_sync", None)
        self.arm.wrap_anew(self.model, self.optimizer)
        if sends is not None:  # buffers go on as before: to wrap is no call of ``prioritize``
            self.arm.net.require_forward_param_sync = sends
            for b, kept in zip(self.model.buffers(), buffers, strict=True):
                b.copy_(kept)

    def no_sync(self) -> Any:
        self.freshen()
        return self.arm.no_sync()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.freshen()
        self.kept_gradients.clear()  # whoever keeps one over the next pass has to clone it
        output = self.arm.net(*args, **kwargs)
        if self.by_hand:  # as after a pass that DDP combines, it sends buffers before the next
            self.arm.net.require_forward_param_sync = True
        return output

    def loss(self, task: int = 0, x: Tensor | None = None) -> Tensor:
        x = self.inputs() if x is None else x
        wanted = torch.randint(0, models.CLASSES, (BATCH,), generator=self._data)
        loss = F.cross_entropy(self.forward(x, task), wanted)
        self.outputs.append(loss.detach())
        return loss

    def backward(self, loss: Tensor, **options: Any) -> None:
        scaled = self.scaler.scale(loss) if self.loop.setting("scaler") else loss
        scaled.backward(**options)

    def one_pass(self, task: int = 0) -> None:
        self.backward(self.loss(task))

    def zero(self) -> None:
        self.optimizer.zero_grad()

    @contextmanager
    def averages_by_hand(self) -> Iterator[Callable[..., None]]:
        """Where DistributedDataParallel does not combine all passes, it is given their averages.

        Within the context forward passes can be made; what it returns does a backward pass.
        """
        self.freshen()
        if not self.arm.is_ddp:
            yield self.backward
            return

        def backward(loss: Tensor, **options: Any) -> None:
            self.backward(loss, **options)
            for p in self.parameters():
                if not p.requires_grad:
                    continue
                used = torch.tensor(float(p.grad is not None))
                dist.all_reduce(used)
                if used:
                    mine = torch.zeros_like(p) if p.grad is None else p.grad / dist.get_world_size()
                    dist.all_reduce(mine)
                    p.grad = mine if p.grad is None else p.grad.copy_(mine)

        self.by_hand = True
        with self.arm.no_sync():
            yield backward
        self.by_hand = False

    def step(self, how: str = "plain") -> None:
        step = {
            "plain": self.stepper.step,
            "kept": self.step_before if self.stepper is self.optimizer else self.stepper.step,
            "by class": lambda *a: type(self.stepper).step(self.stepper, *a),
        }[how]
        if self.loop.setting("scaler"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.unscaled = False
        elif self.loop.optimizer in optimizers.CLOSURE_ONLY:
            self.freshen()
            self.outputs.append(step(self.closure).detach())
        else:
            step()
        if self.scheduler is not None:
            self.scheduler.step()

    def closure(self) -> Tensor:
        """What ``step`` may be given."""
        self.zero()
        loss = self.loss()
        loss.backward()
        return loss

    def autocast(self, on: bool) -> Any:
        """Unless torch has nothing to compute the model with then."""
        on = on and self.loop.model != "recurrent"
        return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()
