"""Training loops that no setting of ``Case`` describes; each returns all that must be equal."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.utils.data import DataLoader, TensorDataset

import soonest

BATCH = 8
_UNUSED = {"find_unused_parameters": True}


@dataclass
class Arm:
    """One of the ways to train that are compared.

    Args:
        name: ``ddp`` or ``soonest``.
        options: further arguments of prioritize.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    handles: list[soonest.Handle] = field(default_factory=list[soonest.Handle])

    @property
    def is_ddp(self) -> bool:
        return self.name == "ddp"

    def share(self, model: nn.Module, *optimizers: Optimizer, **ddp: Any) -> nn.Module:
        """Trains a model over the ranks from now on.

        Returns:
            What to call instead of the model.
        """
        if self.is_ddp:
            return DistributedDataParallel(model, **ddp)
        if len(optimizers) == 1:
            self.handles.append(soonest.prioritize(model, optimizers[0], **self.options))
        else:
            self.handles.extend(soonest.prioritize(model, optimizers, **self.options))
        return model

    def share_anew(self, model: nn.Module, **ddp: Any) -> nn.Module:
        """After other parameters have come to be trained: soonest sees that by itself."""
        return DistributedDataParallel(model, **ddp) if self.is_ddp else model

    def outcome(self, *trained: nn.Module | Optimizer, seen: Any = ()) -> dict[str, Any]:
        """What must be equal, of models and optimizers. Afterwards they are plain ones."""
        for handle in self.handles:
            handle.detach()
        found: dict[str, Any] = {"seen": list(seen)}
        for index, one in enumerate(trained):
            if isinstance(one, Optimizer):
                found[f"optimizer {index}"] = copy.deepcopy(one.state_dict())
            else:
                found[f"parameters {index}"] = {n: p.detach() for n, p in one.named_parameters()}
                if not self.options.get("shard_optimizer"):
                    found[f"gradients {index}"] = [p.grad for p in one.parameters()]
        return found


class Data:
    """Batches, different ones on every rank."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(dist.get_rank())

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(BATCH, 12, generator=self._generator)
        return x, torch.randint(0, 5, (BATCH,), generator=self._generator)

    def loss(self, net: nn.Module) -> Tensor:
        x, y = self()
        return F.cross_entropy(net(x), y)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 60), nn.ReLU(), nn.Linear(60, 5)
    )


def adamw(*models: nn.Module, **options: Any) -> Optimizer:
    parameters = [p for model in models for p in model.parameters()]
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, **options)


def sgd(*models: nn.Module) -> Optimizer:
    return torch.optim.SGD([p for m in models for p in m.parameters()], lr=0.05, momentum=0.9)


# Several models, optimizers, passes


def several_forwards(arm: Arm, steps: int) -> dict[str, Any]:
    """Three forward passes come before one backward pass."""
    model = mlp()
    optimizer = adamw(model)
    net, data = arm.share(model, optimizer), Data()
    for _ in range(steps):
        optimizer.zero_grad()
        sum((data.loss(net) for _ in range(3)), torch.zeros(())).backward()
        optimizer.step()
    return arm.outcome(model, optimizer)


def gan(arm: Arm, steps: int) -> dict[str, Any]:
    """Two models, each with an optimizer; the second's loss goes through the first."""
    judge, maker = mlp(), nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12))
    of_judge, of_maker = adamw(judge), adamw(maker)
    judging, making = arm.share(judge, of_judge), arm.share(maker, of_maker)
    data, seen = Data(), []

    def loss(x: Tensor, wanted: float) -> Tensor:
        out = judging(x)[:, 0]
        return F.binary_cross_entropy_with_logits(out, torch.full_like(out, wanted))

    for _ in range(steps):
        real, _ = data()
        fake = making(real[:, :4])
        of_judge.zero_grad()
        loss(real, 1.0).backward()
        loss(fake.detach(), 0.0).backward()
        of_judge.step()
        of_maker.zero_grad()
        last = loss(fake, 1.0)
        last.backward()
        of_maker.step()
        seen.append(last.detach())
    return arm.outcome(judge, of_judge, maker, of_maker, seen=seen)


def two_optimizers(arm: Arm, steps: int) -> dict[str, Any]:
    """Each of two optimizers has half of the model, and one steps less often."""
    model = mlp()
    first, second = adamw(model[:2]), sgd(model[2:])
    net, data = arm.share(model, first, second), Data()
    for step in range(steps):
        first.zero_grad()
        if step % 2 == 0:
            second.zero_grad()
        data.loss(net).backward()
        first.step()
        if step % 2:
            second.step()
    return arm.outcome(model, first, second)


def two_optimizers_in_turn(arm: Arm, steps: int) -> dict[str, Any]:
    """The halves of a model are used and trained in turn."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = mlp(), mlp()

        def forward(self, x: Tensor, which: int) -> Tensor:
            return self.other(x) if which else self.one(x)

    model = Halves()
    optimizers = adamw(model.one), adamw(model.other)
    net, data = arm.share(model, *optimizers, **_UNUSED), Data()
    for step in range(steps):
        x, y = data()
        for which, optimizer in enumerate(optimizers):
            if (step + which) % 3:
                optimizer.zero_grad()
                F.cross_entropy(net(x, which), y).backward()
                optimizer.step()
    return arm.outcome(model, *optimizers)


def two_models(arm: Arm, steps: int) -> dict[str, Any]:
    """One optimizer trains two models."""
    one, other = nn.Sequential(nn.Linear(12, 12), nn.Tanh()), mlp()
    optimizer = adamw(one, other)
    if arm.is_ddp:
        first, second = arm.share(one), arm.share(other)
    else:
        first, second = one, other
        arm.share(nn.ModuleList([one, other]), optimizer)
    data, seen = Data(), []
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = data()
        F.cross_entropy(second(first(x)), y).backward()
        seen.append(nn.utils.clip_grad_norm_([*one.parameters(), *other.parameters()], 0.5))
        optimizer.step()
    return arm.outcome(one, other, optimizer, seen=seen)


# Parameters that come and go


def unfrozen(arm: Arm, steps: int) -> dict[str, Any]:
    """A layer is frozen at first, another later; gradients are clipped."""
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = adamw(model)
    net, data, seen = arm.share(model, optimizer), Data(), []
    for step in range(steps):
        if step == steps // 3:
            model[0].requires_grad_(True)
            net = arm.share_anew(model)
        if step == 2 * steps // 3:
            model[2].requires_grad_(False)
            net = arm.share_anew(model)
        optimizer.zero_grad()
        data.loss(net).backward()
        seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
    return arm.outcome(model, optimizer, seen=seen)


def in_stages(arm: Arm, steps: int) -> dict[str, Any]:
    """First only the last layer is trained, from the second step on only the first."""
    model = mlp()
    model[:4].requires_grad_(False)
    optimizer = adamw(model)
    net, data = arm.share(model, optimizer), Data()
    for step in range(steps):
        if step == 1:
            model.requires_grad_(False)
            model[0].requires_grad_(True)
            net = arm.share_anew(model)
        optimizer.zero_grad()
        data.loss(net).backward()
        optimizer.step()
    return arm.outcome(model, optimizer)


def toggled(arm: Arm, steps: int) -> dict[str, Any]:
    """Halves of a model are frozen in turn, as a GAN's are in some frameworks."""
    model = mlp()
    optimizer = adamw(model)
    net, data = arm.share(model, optimizer, **_UNUSED), Data()
    for step in range(steps):
        for layer in (0, 2):
            model[layer].requires_grad_((step + layer // 2) % 2 == 0)
        optimizer.zero_grad()
        data.loss(net).backward()
        optimizer.step()
    return arm.outcome(model, optimizer)


def group_added(arm: Arm, steps: int) -> dict[str, Any]:
    """A layer comes to be trained, with a parameter group of its own."""
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = adamw(model[2], model[4])
    net, data = arm.share(model, optimizer), Data()
    for step in range(steps):
        if step == steps // 3:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 3e-3})
            net = arm.share_anew(model)
        optimizer.zero_grad()
        data.loss(net).backward()
        optimizer.step()
    return arm.outcome(model, optimizer)


def held_later(arm: Arm, steps: int) -> dict[str, Any]:
    """A layer's gradients are combined from the start, but the optimizer gets it later."""
    model = mlp()
    optimizer = adamw(model[2], model[4])
    net, data = arm.share(model, optimizer), Data()
    for step in range(steps):
        if step == steps // 3:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 3e-3})
        optimizer.zero_grad()
        data.loss(net).backward()
        optimizer.step()
    return arm.outcome(model, optimizer)


def module_added(arm: Arm, steps: int) -> dict[str, Any]:
    """The model gets another layer, which differs between ranks at first."""
    model = nn.Sequential(nn.Linear(12, 5))
    optimizer = adamw(model)
    net, data = arm.share(model, optimizer), Data()
    for step in range(steps):
        if step == steps // 3:
            torch.manual_seed(dist.get_rank())
            model.insert(0, nn.Linear(12, 12))
            net = arm.share_anew(model)
            optimizer.add_param_group({"params": list(model[0].parameters())})
        optimizer.zero_grad()
        data.loss(net).backward()
        optimizer.step()
    return arm.outcome(model, optimizer)


# Numbers


def scaled(arm: Arm, steps: int, **options: Any) -> dict[str, Any]:
    """A GradScaler skips steps in which one rank has infinite gradients."""
    model = mlp()
    optimizer = adamw(model, **options)
    net, data, seen = arm.share(model, optimizer), Data(), []
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5)
    for step in range(steps):
        optimizer.zero_grad()
        loss = data.loss(net)
        if step % 10 == 3 and dist.get_rank() == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if step % 2:
            scaler.unscale_(optimizer)
            seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).isfinite())
        scaler.step(optimizer)
        scaler.update()
        seen.append(scaler.get_scale())
    return arm.outcome(model, optimizer, seen=seen)


def scaled_fused(arm: Arm, steps: int) -> dict[str, Any]:
    """The optimizer itself undoes the scale."""
    return scaled(arm, steps, fused=True)


def autocast(arm: Arm, steps: int) -> dict[str, Any]:
    """Forward passes compute in bfloat16."""
    model = mlp()
    optimizer = adamw(model)
    net, data, seen = arm.share(model, optimizer), Data(), []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = data.loss(net)
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
    return arm.outcome(model, optimizer, seen=seen)


def clipped_by_value(arm: Arm, steps: int) -> dict[str, Any]:
    model = mlp()
    optimizer = sgd(model)
    net, data = arm.share(model, optimizer), Data()
    for step in range(steps):
        optimizer.zero_grad()
        data.loss(net).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.01, foreach=step % 2 == 0)
        optimizer.step()
    return arm.outcome(model, optimizer)


# What stands around the optimizer


def plateau(optimizer: Optimizer) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, cooldown=1)


def sequence(optimizer: Optimizer) -> Any:
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=8),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
        lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[8, 16])


SCHEDULERS: dict[type, Callable[[Optimizer], Any]] = {
    lr_scheduler.LambdaLR: lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    lr_scheduler.MultiplicativeLR: lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    lr_scheduler.StepLR: lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    lr_scheduler.MultiStepLR: lambda o: lr_scheduler.MultiStepLR(o, [1, 3], gamma=0.5),
    lr_scheduler.ConstantLR: lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2),
    lr_scheduler.LinearLR: lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    lr_scheduler.ExponentialLR: lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    lr_scheduler.SequentialLR: sequence,
    lr_scheduler.CosineAnnealingLR: lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=3),
    lr_scheduler.ChainedScheduler: lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, gamma=0.8), lr_scheduler.ConstantLR(o, total_iters=2)]
    ),
    lr_scheduler.ReduceLROnPlateau: plateau,
    # These two change betas as well.
    lr_scheduler.CyclicLR: lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=2),
    lr_scheduler.OneCycleLR: lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=6),
    lr_scheduler.CosineAnnealingWarmRestarts: (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2)
    ),
    lr_scheduler.PolynomialLR: lambda o: lr_scheduler.PolynomialLR(o, total_iters=6),
}


def every_scheduler(arm: Arm, steps: int) -> dict[str, Any]:
    """Schedulers of every kind take turns, each for some steps; one learning rate is a tensor."""
    model = mlp()
    rate = torch.tensor(1e-2)
    groups = [
        {"params": list(model[:3].parameters())},
        {"params": list(model[3:].parameters()), "lr": rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)
    net, data, seen = arm.share(model, optimizer), Data(), []
    for make in SCHEDULERS.values():
        rate.fill_(1e-2)
        for group, lr in zip(optimizer.param_groups, (1e-2, rate), strict=True):
            group.pop("initial_lr", None)
            group["lr"] = lr
        scheduler = make(optimizer)
        takes_loss = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        for _ in range(steps // 6):
            optimizer.zero_grad()
            loss = data.loss(net)
            loss.backward()
            optimizer.step()
            scheduler.step(*([loss.detach()] if takes_loss else []))
            seen.append([(float(group["lr"]), group["betas"]) for group in optimizer.param_groups])
    return arm.outcome(model, optimizer, seen=seen)


def scheduled(make: Callable[[Optimizer], Any]) -> Callable[[Arm, int], dict[str, Any]]:
    """A scheduler changes the learning rate right after every step."""

    def loop(arm: Arm, steps: int) -> dict[str, Any]:
        model = mlp()
        optimizer = adamw(model)
        net, data = arm.share(model, optimizer), Data()
        scheduler, seen = make(optimizer), []
        takes_loss = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = data.loss(net)
            loss.backward()
            optimizer.step()
            scheduler.step(*([loss.detach()] if takes_loss else []))
            seen.append(optimizer.param_groups[0]["lr"])
        return arm.outcome(model, optimizer, seen=seen)

    return loop


def averaged(arm: Arm, steps: int) -> dict[str, Any]:
    """Stochastic weight averaging with its scheduler, an EMA, and BatchNorm's second pass."""
    model = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = sgd(model)
    net, data = arm.share(model, optimizer), Data()
    mean = swa_utils.AveragedModel(model)
    ema = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=5)
    for step in range(steps):
        optimizer.zero_grad()
        data.loss(net).backward()
        optimizer.step()
        ema.update_parameters(model)
        if step >= steps // 2:
            mean.update_parameters(model)
            scheduler.step()
    swa_utils.update_bn([data()[0] for _ in range(3)], mean)
    mean.eval()
    return arm.outcome(model, optimizer, mean, ema, seen=[mean(torch.ones(2, 12)).detach()])


def hooked(arm: Arm, steps: int) -> dict[str, Any]:
    """The user's own hooks see and change gradients before they are combined."""
    model = mlp()
    optimizer = adamw(model)
    seen: list[Any] = []

    def local(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen.append(parameter.grad.norm())
        parameter.grad.mul_(0.5)

    def passing(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        seen.append(grad_output[0].norm())

    def add_hooks() -> None:
        model[2].weight.register_hook(lambda gradient: 3 * gradient)
        model[2].weight.register_post_accumulate_grad_hook(local)
        model[4].register_full_backward_hook(passing)
        model[4].register_full_backward_pre_hook(lambda _, gradients: seen.append(gradients[0]))

    add_hooks()
    net, data = arm.share(model, optimizer), Data()
    add_hooks()
    for _ in range(steps):
        optimizer.zero_grad()
        data.loss(net).backward()
        optimizer.step()
    return arm.outcome(model, optimizer, seen=seen)


# What is done with the model


def called_functionally(arm: Arm, steps: int) -> dict[str, Any]:
    """``functional_call`` with what is computed from the model's own, and with other parameters."""
    model = mlp()
    optimizer = adamw(model)
    net, data, seen = arm.share(model, optimizer), Data(), []
    others = {name: nn.Parameter(p.detach().clone()) for name, p in net.named_parameters()}
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = data()
        halved = {name: 0.5 * p for name, p in net.named_parameters()}
        F.cross_entropy(torch.func.functional_call(net, halved, (x,)), y).backward()
        optimizer.step()
        with torch.no_grad():
            seen.append(torch.func.functional_call(net, others, (x,)))
    return arm.outcome(model, optimizer, seen=seen)


def transformed(arm: Arm, steps: int) -> dict[str, Any]:
    """A loss behind an inner step by ``torch.func.grad``; gradients of samples, and a Jacobian."""
    model = mlp()
    optimizer = adamw(model)
    net, data, seen = arm.share(model, optimizer), Data(), []

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    for _ in range(steps):
        optimizer.zero_grad()
        x, y = data()
        inner = torch.func.grad(loss)(dict(model.named_parameters()), x, y)
        adapted = {
            name: p - 0.1 * inner[name.removeprefix("module.")]
            for name, p in net.named_parameters()
        }
        F.cross_entropy(torch.func.functional_call(net, adapted, (x,)), y).backward()
        optimizer.step()
        plain = {name: p.detach() for name, p in model.named_parameters()}
        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(plain, x, y)
        seen += [gradient.norm() for gradient in each.values()]
        seen.append(torch.func.jacrev(lambda w: w.square().sum())(model[0].weight).detach())
    return arm.outcome(model, optimizer, seen=seen)


def normed_by_hooks(arm: Arm, steps: int) -> dict[str, Any]:
    """Weights are computed anew by forward hooks; one of them is made a plain one again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # there is a newer way
        model = nn.Sequential(
            nn.utils.weight_norm(nn.Linear(12, 16)), nn.Tanh(),
            nn.utils.spectral_norm(nn.Linear(16, 16)), nn.Tanh(), nn.Linear(16, 5),
        )  # fmt: skip
    optimizer = adamw(model)
    net, data, seen = arm.share(model, optimizer), Data(), []
    for _ in range(steps):
        optimizer.zero_grad()
        data.loss(net).backward()
        optimizer.step()
        net.eval()
        with torch.no_grad():
            seen.append(net(torch.ones(2, 12)))
        net.train()
    outcome = arm.outcome(model, optimizer, seen=seen)
    nn.utils.remove_weight_norm(model[0])
    return {**outcome, "weight": model[0].weight.detach()}


def copied(arm: Arm, steps: int) -> dict[str, Any]:
    """Copies are made in the middle, in all ways, and used, and one of them is trained alone."""
    model = mlp()
    optimizer = adamw(model)
    net, data, seen = arm.share(model, optimizer), Data(), []
    for step in range(steps):
        optimizer.zero_grad()
        data.loss(net).backward()
        optimizer.step()
        if step % 5 == 2:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            seen += [
                list(twin.parameters())
                for twin in (
                    copy.deepcopy(model),
                    pickle.loads(pickle.dumps(model)),
                    torch.load(file, weights_only=False),
                )
            ]
            alone, of_alone = copy.deepcopy((model, optimizer))
            of_alone.zero_grad()
            alone(torch.ones(2, 12)).square().sum().backward()
            of_alone.step()
            seen.append(list(alone.parameters()))
    return arm.outcome(model, optimizer, seen=seen)


def fed_by_workers(arm: Arm, steps: int) -> dict[str, Any]:
    """Processes are forked in the middle of training, and load what it is fed with."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    model = mlp()
    optimizer = adamw(model)
    net, data = arm.share(model, optimizer), Data()
    x, y = zip(*(data() for _ in range(steps // 3)), strict=True)
    loader = DataLoader(
        TensorDataset(torch.cat(x), torch.cat(y)), BATCH, num_workers=1,
        multiprocessing_context="fork",
    )  # fmt: skip
    for _ in range(3):
        for inputs, wanted in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(inputs), wanted).backward()
            optimizer.step()
    return arm.outcome(model, optimizer)


def uneven(arm: Arm, steps: int) -> dict[str, Any]:
    """Ranks have inputs for different numbers of steps, and then train on together."""
    model = mlp()
    optimizer = sgd(model)
    net, data = arm.share(model, optimizer), Data()
    joinable: Any = net if arm.is_ddp else arm.handles[0]

    def train(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            data.loss(net).backward()
            optimizer.step()

    with joinable.join():
        train(steps // 3 + 2 * dist.get_rank())
    with Join([joinable], divide_by_initial_world_size=False):
        train(steps // 3 - 2 * dist.get_rank())
    train(steps // 3)
    return arm.outcome(model, optimizer)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.other(torch.relu(self.one(x))))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def _train_compiled(arm: Arm, steps: int, model: Blocks, net: nn.Module, opt: Optimizer) -> Any:
    data, seen = Data(), []
    for step in range(steps):
        opt.zero_grad()
        data.loss(net).backward()
        opt.step()
        if step % 4 == 3:
            net.eval()
            with torch.no_grad():
                seen.append(net(torch.ones(2, 12)))
            net.train()
    return arm.outcome(model, opt, seen=seen)


def compiled_before(arm: Arm, steps: int) -> dict[str, Any]:
    """The model is what ``torch.compile`` returned."""
    torch._dynamo.reset()
    model = Blocks()
    whole: Any = torch.compile(model, backend="aot_eager")
    optimizer = adamw(model)
    return _train_compiled(arm, steps, model, arm.share(whole, optimizer), optimizer)


def compiled_after(arm: Arm, steps: int) -> dict[str, Any]:
    """The model is compiled when it is trained over the ranks already."""
    torch._dynamo.reset()
    model = Blocks()
    optimizer = adamw(model)
    whole: Any = torch.compile(model, backend="aot_eager")
    net = arm.share(whole if arm.is_ddp else model, optimizer)
    return _train_compiled(arm, steps, model, net if arm.is_ddp else whole, optimizer)


def compiled_by_block(arm: Arm, steps: int) -> dict[str, Any]:
    """Each block is compiled by itself, in the ways that there are, the last one at the end."""
    torch._dynamo.reset()
    model = Blocks()
    model.blocks[0].compile(backend="aot_eager")
    model.blocks[1] = torch.compile(model.blocks[1], backend="aot_eager")  # type: ignore[assignment]
    optimizer = adamw(model)
    net = arm.share(model, optimizer)
    model.blocks[2].compile(backend="aot_eager")
    return _train_compiled(arm, steps, model, net, optimizer)


LOOPS: dict[str, Callable[[Arm, int], dict[str, Any]]] = {
    "several forward passes": several_forwards,
    "GAN: two models, two optimizers": gan,
    "one model, two optimizers": two_optimizers,
    "halves of a model in turn": two_optimizers_in_turn,
    "two models, one optimizer": two_models,
    "layer unfrozen, another frozen": unfrozen,
    "trained in stages": in_stages,
    "layers frozen in turn": toggled,
    "parameter group added": group_added,
    "parameter group added, shared before": held_later,
    "module added": module_added,
    "GradScaler": scaled,
    "GradScaler, fused": scaled_fused,
    "autocast": autocast,
    "clipping by value": clipped_by_value,
    "ReduceLROnPlateau": scheduled(plateau),
    "SequentialLR: linear, cosine, lambda": scheduled(sequence),
    "schedulers of every kind in turn": every_scheduler,
    "SWA, EMA, SWALR, update_bn": averaged,
    "gradient hooks": hooked,
    "functional_call": called_functionally,
    "torch.func: grad, vmap, jacrev": transformed,
    "weight norm, spectral norm by hooks": normed_by_hooks,
    "copies in the middle": copied,
    "DataLoader with workers": fed_by_workers,
    "uneven inputs": uneven,
    "compiled as a whole, before": compiled_before,
    "compiled as a whole, after": compiled_after,
    "compiled by block": compiled_by_block,
}
