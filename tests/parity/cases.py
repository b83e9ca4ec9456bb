"""Training runs that must come out the same with DistributedDataParallel and with soonest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import soonest
from parity.loops import BATCH, LOOPS, Arm

STEPS = 30


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 300), nn.ReLU(), nn.Linear(300, 5)
    )


def unbiased() -> nn.Module:
    """Matrices only."""
    return nn.Sequential(nn.Linear(12, 48, bias=False), nn.GELU(), nn.Linear(48, 5, bias=False))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        images = F.interpolate(x.view(-1, 1, 3, 4), size=(8, 8))
        return self.head(self.body(images).flatten(1))


class ChannelsLast(Cnn):
    def __init__(self) -> None:
        super().__init__()
        self.to(memory_format=torch.channels_last)


class Tied(nn.Module):
    """A transformer whose output head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 7).long() % 20
        return self.head(self.layer(self.embed(tokens)).mean(1))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(-1, 4, 3))[0][:, -1])


class Branch(nn.Module):
    """Takes one branch on even and another on odd ranks, changing by step; one is never taken."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.left, self.right, self.never = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        stem = torch.relu(self.stem(x))
        if self.calls % 3 == 0:
            return self.head(stem)
        return self.head(self.left(stem) if dist.get_rank() % 2 else self.right(stem))


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.frozen(torch.tanh(self.first(x))))


class Twice(nn.Module):
    """Uses one layer twice, and its weight once more by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))
        return self.last(y @ self.shared.weight)


class Mixed(nn.Module):
    """Parameters of several dtypes, and one without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16).double()
        self.last = nn.Linear(16, 5)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x.double())).float() * self.scale.float()
        return self.last(hidden) + self.empty.sum()


class Numbers(nn.Module):
    """Complex numbers, and real ones of three more kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16).double()
        self.wave = nn.Parameter(torch.randn(9, dtype=torch.complex64))
        self.turn = nn.Parameter(torch.randn(16, 9, dtype=torch.complex64).t())
        self.scale = nn.Parameter(torch.ones(16, dtype=torch.float16))
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(torch.relu(self.first(x.double())).float()) * self.wave
        hidden = torch.fft.irfft(waves) + (waves @ self.turn).abs()
        return self.last(hidden * self.scale.float())


class Twisted(nn.Module):
    """Forces its argument, a weight, to be skew."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu(1) - weight.triu(1).t()


def parametrized() -> nn.Module:
    skew = nn.Linear(16, 16)
    nn.utils.parametrize.register_parametrization(skew, "weight", Twisted())
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(12, 16)), nn.Tanh(), skew, nn.Tanh(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 5)),
    )  # fmt: skip


class Checkpointed(nn.Module):
    """Computes two of its parts again in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.head = nn.Linear(12, 16), nn.Linear(16, 5)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.parts:
            x = x + checkpoint(part, x, use_reentrant=self.reentrant)
        return self.head(x)


class CheckpointedTwice(nn.Module):
    """Runs through one layer twice, each time in a checkpoint, and then through another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = torch.tanh(checkpoint(self.again, x, use_reentrant=True))
        return checkpoint(self.last, x, use_reentrant=True)


class Looped(nn.Module):
    """Runs through one layer more or less often."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x)
        for _ in range(1 + self.calls % 3):
            x = torch.tanh(self.again(x))
        return self.last(x)


class SignSgd(torch.optim.Optimizer):
    """An optimizer that torch does not know. It counts its steps in its group and on itself."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "count": 0})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        for group in self.param_groups:
            group["count"] += 1
            rate = group["lr"] / (1 + 0.1 * group["count"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["average"] = 0.9 * state.get("average", 0) + 0.1 * p.grad
                p.add_(state["average"].sign(), alpha=-rate)
        return loss


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": parameters[::2], "weight_decay": 0.1},
        {"params": parameters[1::2], "weight_decay": 0.0, "lr": 3e-3},
    ]


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, **options)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    # A small eps would blow up the rounding of gradients that are zero but for rounding, as those
    # of a bias before a normalization, into full steps.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


@dataclass(frozen=True)
class Case:
    """One training run.

    Args:
        model, optimizer: build them.
        accumulate: backward passes per step, all but the last without synchronization.
        backwards: backward passes per step, all synchronized.
        clip: norm to clip to.
        one_cycle: whether a OneCycle schedule is stepped every batch: before or after
            ``prioritize``.
        zero: how gradients are cleared: none, zero, or by the model.
        zero_last: clear after the step instead of before the backward pass.
        look: what to read in the middle of overlap: eval, state_dict, ema, grads.
        closure: give ``step`` a closure.
        ddp: further arguments of DistributedDataParallel.
        soonest: further arguments of prioritize.
        rounding: how far more than two ranks may be off, relative; that of float32 over the steps.
        loop: trains instead, where these settings do not fit.
    """

    model: Callable[[], nn.Module] = mlp
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    accumulate: int = 1
    backwards: int = 1
    clip: float | None = None
    one_cycle: str | None = None
    zero: str = "none"
    zero_last: bool = False
    look: tuple[str, ...] = ()
    closure: bool = False
    ddp: dict[str, Any] = field(default_factory=dict[str, Any])
    soonest: dict[str, Any] = field(default_factory=dict[str, Any])
    rounding: float = 2e-4
    loop: Callable[[Arm, int], dict[str, Any]] | None = None

    @property
    def sharded(self) -> bool:
        """Whether each rank keeps only its part of the optimizer's state."""
        return bool(self.soonest.get("shard_optimizer"))


UNUSED = {"find_unused_parameters": True}
CASES: dict[str, Case] = {
    "mlp": Case(),
    "cnn with BatchNorm": Case(Cnn),
    "channels-last cnn": Case(ChannelsLast),
    "tied transformer": Case(Tied),
    "lstm": Case(Lstm),
    "branch by rank, AdamW": Case(Branch, ddp=UNUSED),
    "branch by rank, momentum": Case(
        Branch, lambda m: sgd(m, momentum=0.9, weight_decay=0.1), ddp=UNUSED
    ),
    "branch by rank, accumulated": Case(Branch, accumulate=2, ddp=UNUSED),
    "branch by rank, zeroed": Case(Branch, zero="zero", ddp=UNUSED),
    "frozen layer": Case(Frozen),
    "parameter used twice": Case(Twice),
    # All goes through a scale in bfloat16, whose gradients are summed in float32 here.
    "several dtypes": Case(Mixed, rounding=0.1),
    "complex numbers": Case(Numbers, rounding=0.1),
    "weight norm, spectral norm, parametrization": Case(parametrized),
    "checkpoint": Case(lambda: Checkpointed(reentrant=False)),
    "checkpoint, reentrant": Case(lambda: Checkpointed(reentrant=True)),
    "checkpoint, reentrant, of a layer used twice": Case(
        CheckpointedTwice, ddp={"static_graph": True}
    ),
    "layer used in a loop": Case(Looped),
    "cnn with BatchNorm, each rank its own": Case(
        Cnn, ddp={"forward_sync_buffers": False}, soonest={"broadcast_buffers": False}
    ),
    **{
        f"all by {method}": Case(Tied, soonest={"method": method})
        for method in ("allreduce", "gather", "exchange", "split")
    },
    "SGD": Case(optimizer=sgd),
    "SGD momentum": Case(optimizer=lambda m: sgd(m, momentum=0.9)),
    "SGD Nesterov, decay": Case(
        optimizer=lambda m: sgd(m, momentum=0.9, nesterov=True, weight_decay=0.01)
    ),
    "SGD foreach": Case(optimizer=lambda m: sgd(m, momentum=0.9, foreach=True)),
    "Adam": Case(optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=1e-2)),
    "Adam amsgrad, tensor lr": Case(
        optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(1e-2), amsgrad=True)
    ),
    "Adam, tensor betas": Case(
        optimizer=lambda m: torch.optim.Adam(
            m.parameters(), lr=1e-2, betas=(torch.tensor(0.9), torch.tensor(0.99)), eps=1e-3
        )
    ),
    "AdamW, maximize": Case(
        optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, maximize=True)
    ),
    "AdamW fused": Case(optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True)),
    "RMSprop": Case(
        optimizer=lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-2, momentum=0.5, eps=1e-3)
    ),
    "Adagrad": Case(optimizer=lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2)),
    **{
        name: Case(optimizer=lambda m, of=name: getattr(torch.optim, of)(m.parameters(), lr=1e-2))
        for name in ("NAdam", "RAdam", "Adadelta", "Adamax", "Rprop", "ASGD")
    },
    "Adafactor": Case(optimizer=lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2)),
    "Muon": Case(unbiased, lambda m: torch.optim.Muon(m.parameters(), lr=1e-2)),
    "foreign optimizer": Case(optimizer=lambda m: SignSgd(m.parameters())),
    "LBFGS": Case(optimizer=lambda m: torch.optim.LBFGS(m.parameters(), max_iter=2), closure=True),
    "closure": Case(closure=True),
    "parameter groups": Case(optimizer=lambda m: torch.optim.AdamW(two_groups(m))),
    "OneCycle made before": Case(optimizer=lambda m: sgd(m, momentum=0.9), one_cycle="before"),
    "OneCycle made after": Case(one_cycle="after"),
    "accumulation with no_sync": Case(accumulate=3),
    "several backward passes": Case(backwards=2),
    "clipping": Case(clip=0.5),
    "clipping, momentum, foreach": Case(
        optimizer=lambda m: sgd(m, momentum=0.9, foreach=True), clip=0.5
    ),
    "evaluation in overlap": Case(Cnn, look=("eval",)),
    "state_dict in overlap": Case(look=("state_dict",)),
    "EMA after every step": Case(look=("ema",)),
    "gradients logged in overlap": Case(look=("grads",)),
    "zero_grad to zero": Case(zero="zero"),
    "zero_grad to zero, after the step": Case(zero="zero", zero_last=True),
    "zero_grad to none, after the step": Case(zero_last=True),
    "zero_grad of the model": Case(zero="model"),
    "zero_grad of the model to zero": Case(zero="model to zero", zero_last=True),
    "zero_grad to zero, foreach": Case(
        optimizer=lambda m: sgd(m, momentum=0.9, foreach=True), zero="zero", zero_last=True
    ),
    **{name: Case(loop=loop) for name, loop in LOOPS.items()},
}


_SHARDED = (
    "mlp", "cnn with BatchNorm", "channels-last cnn", "tied transformer", "lstm", "frozen layer",
    "branch by rank, AdamW", "branch by rank, momentum", "branch by rank, zeroed",
    "branch by rank, accumulated", "several dtypes", "SGD", "SGD foreach",
    "SGD Nesterov, decay", "Adam amsgrad, tensor lr", "AdamW fused", "RMSprop", "Adagrad", "NAdam",
    "RAdam", "Adadelta", "Adamax", "Rprop", "ASGD", "closure", "parameter groups",
    "OneCycle made before", "accumulation with no_sync", "several backward passes", "clipping",
    "state_dict in overlap", "EMA after every step", "zero_grad to zero, after the step",
    "zero_grad of the model to zero", "several forward passes",
    "one model, two optimizers", "layer unfrozen, another frozen", "parameter group added",
    "module added", "GradScaler",
)  # fmt: skip
CASES |= {
    f"{name}, sharded": replace(CASES[name], soonest={"shard_optimizer": True}) for name in _SHARDED
}

_SHARDED_OF_FOUR = (
    "mlp", "tied transformer", "branch by rank, AdamW", "several dtypes", "clipping", "ASGD",
)  # fmt: skip
_TWO_TELL = (
    "checkpoint", "checkpoint, reentrant, of a layer used twice", "layer used in a loop",
    "weight norm, spectral norm, parametrization",
    "Adam, tensor betas", "AdamW, maximize", "halves of a model in turn", "trained in stages",
    "two models, one optimizer", "parameter group added, shared before", "GradScaler, fused",
    "autocast", "Muon", "Adafactor", "schedulers of every kind in turn",
    "torch.func: grad, vmap, jacrev", "weight norm, spectral norm by hooks",
    "clipping by value", "ReduceLROnPlateau", "SequentialLR: linear, cosine, lambda",
    "SWA, EMA, SWALR, update_bn", "functional_call", "copies in the middle",
    "DataLoader with workers", "compiled as a whole, before", "compiled as a whole, after",
    "compiled by block",
)  # fmt: skip
OF_FOUR = [
    name
    for name in CASES
    if (name.removesuffix(", sharded") in _SHARDED_OF_FOUR if CASES[name].sharded else True)
    and name not in _TWO_TELL
]
"""Those to train on four ranks: much, as how state is shared out, does not depend on the rest."""


def train(case: Case, arm: str, steps: int = STEPS) -> dict[str, Any]:
    """Trains on this rank and returns all that must be equal.

    The loop ends with a step, without another forward pass.
    """
    torch.manual_seed(7)
    if case.loop is not None:
        return case.loop(Arm(arm, case.soonest), steps)
    model = case.model()
    optimizer = case.optimizer(model)
    scheduler = _schedule(optimizer) if case.one_cycle == "before" else None
    seen: list[Any] = []
    net: nn.Module = model
    handle = None
    if arm == "ddp":
        net = DistributedDataParallel(model, **case.ddp)
        no_sync: Any = net.no_sync
    else:
        handle = soonest.prioritize(model, optimizer, **case.soonest)
        no_sync = handle.no_sync
    if case.one_cycle == "after":
        scheduler = _schedule(optimizer)
    ema = copy.deepcopy(model)
    data = torch.Generator().manual_seed(dist.get_rank())

    def clear() -> None:
        if case.zero.startswith("model"):
            model.zero_grad(set_to_none=case.zero == "model")
        else:
            optimizer.zero_grad(set_to_none=case.zero == "none")

    def backward() -> Tensor:
        loss = torch.zeros(())
        passes = case.accumulate * case.backwards
        for index in range(passes):
            x = torch.randn(BATCH, 12, generator=data)
            y = torch.randint(0, 5, (BATCH,), generator=data)
            last_or_synchronized = case.backwards > 1 or index == passes - 1
            with nullcontext() if last_or_synchronized else no_sync():
                loss = F.cross_entropy(net(x), y)
                loss.backward()
        return loss

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        return backward()

    for _ in range(steps):
        if case.closure:
            seen.append(optimizer.step(evaluate))
            continue
        if not case.zero_last:
            clear()
        seen.append(backward().detach())
        if case.clip is not None:
            seen.append(torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        _look(case, model, net, ema, seen)
        if case.zero_last:
            clear()
    if any(True for _ in model.buffers()):
        seen.append(_evaluate(net))  # with DistributedDataParallel, ranks have the same only then
    if not case.sharded:  # where no rank has all of them any more
        seen.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    result = {
        "seen": seen,
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "optimizer": copy.deepcopy(
            handle.optimizer_state_dict() if handle else optimizer.state_dict()
        ),
        "ema": {name: p.detach().clone() for name, p in ema.named_parameters()},
    }
    if handle is not None:
        handle.detach()
    return result


def _schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=STEPS + 5)


def _evaluate(net: nn.Module) -> Tensor:
    net.eval()
    with torch.no_grad():
        output = net(torch.ones(2, 12))
    net.train()
    return output


def _look(case: Case, model: nn.Module, net: nn.Module, ema: nn.Module, seen: list[Any]) -> None:
    """Reads what is in flight now."""
    for look in case.look:
        if look == "eval":
            seen.append(_evaluate(net))
        elif look == "state_dict":
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
        elif look == "ema":
            with torch.no_grad():
                for average, current in zip(ema.parameters(), model.parameters(), strict=True):
                    average.lerp_(current, 0.1)
        elif look == "grads":
            seen.append([p.grad.norm() for p in model.parameters() if p.grad is not None])


def differences(a: Any, b: Any, path: str = "", *, near: float = 0.0) -> list[str]:
    """Where two results differ by more than this, relatively; in any bit if it is zero."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = torch.allclose(a, b, rtol=near, atol=near / 10) if near else torch.equal(a, b)
        gap = "" if same or a.shape != b.shape else f" by {(a - b).abs().max():.3g}"
        return [] if same else [f"{path}{gap}"]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        pairs = [(f"{path}.{key}", a[key], b[key]) for key in a]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = [(f"{path}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    elif isinstance(a, float) and isinstance(b, float) and near:
        return [] if abs(a - b) <= near / 20 * max(1.0, abs(a)) else [f"{path}: {a} / {b}"]
    else:
        return [] if a == b else [f"{path}: {a!r} / {b!r}"]
    return [text for where, x, y in pairs for text in differences(x, y, where, near=near)]


def compare(names: list[str]) -> dict[str, list[str]]:
    """Per case, where soonest differs from DistributedDataParallel on this rank."""
    exact = dist.get_world_size() == 2
    found: dict[str, list[str]] = {}
    for name in names:
        case = CASES[name]
        ddp, ours = train(case, "ddp"), train(case, "soonest")
        found[name] = differences(ddp, ours, near=0.0 if exact else case.rounding)[:5]
    return found


def repeat(names: list[str]) -> dict[str, list[str]]:
    """Per case, where two runs with soonest differ on this rank."""
    return {
        name: differences(train(CASES[name], "soonest"), train(CASES[name], "soonest"))[:5]
        for name in names
    }
