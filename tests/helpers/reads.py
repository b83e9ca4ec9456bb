"""Ways to read a model's parameters and gradients early, while they are still in flight."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._tensor_str import printoptions
from torch.optim import Optimizer, swa_utils
from torch.utils.checkpoint import checkpoint


class Unseen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.detach().clone().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, gradient.T @ torch.ones(gradient.shape[0], 4)


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return Unseen.apply(x.reshape(-1, 4), self.weight).view(x.shape)


class Zoo(nn.Module):
    """A module of each kind, parameters used without one, and an embedding that is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.linear = nn.Linear(4, 4)
        self.opaque = Opaque()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.raw = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, 6, 4)."""
        x = self.opaque(self.linear(self.embed(torch.arange(6)) + x))
        x = self.lstm(self.conv(x.mT).mT)[0]
        x = self.layer(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm(x) @ self.raw[0] @ self.raw[1] @ self.embed.weight.T


X = torch.linspace(-1, 1, 24).view(1, 6, 4)
Read = Callable[[Zoo, Optimizer], Tensor]


def build() -> Zoo:
    torch.manual_seed(0)
    return Zoo()


def flat(values: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([value.detach().flatten().clone() for value in values if value is not None])


def evaluated(module: nn.Module, *inputs: Tensor, **options: Any) -> Tensor:
    """Through the fast paths, which take parameters of children without calling these."""
    module.eval()
    with torch.no_grad():
        result = module(*inputs, **options)
    module.train()
    return result[0] if isinstance(result, tuple) else result


def at_address(tensor: Tensor) -> Tensor:
    """What a C extension would read."""
    return torch.tensor([ctypes.c_float.from_address(tensor.data_ptr()).value])


def shown(tensor: Tensor) -> Tensor:
    """Its text, with enough digits to see a small change."""
    with printoptions(precision=9):
        return torch.tensor(list(repr(tensor).encode()))


def reloaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def average(model: nn.Module) -> Tensor:
    ema = [torch.zeros_like(p) for p in model.parameters()]
    torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 0.5)
    return flat(ema)


def in_thread(read: Callable[[], Tensor]) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(read().detach().clone()))
    thread.start()
    thread.join()
    return found[0]


def gathered(tensor: Tensor) -> Tensor:
    """What a collective of the user's sends."""
    every = [torch.zeros(tensor.shape) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor)
    return flat(every)


def broadcast(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        dist.broadcast(tensor, 0)
    return tensor


def functional(model: Zoo, transform: Callable[..., Any]) -> Tensor:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model.linear, parameters, X).square().sum()

    return transform(loss)(dict(model.linear.named_parameters()))["weight"]


def ensemble(model: Zoo) -> Tensor:
    parameters, buffers = torch.func.stack_module_state([model.linear, model.linear])

    def call(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(model.linear, (parameters, buffers), (X,))

    return torch.func.vmap(call)(parameters, buffers)


def each_sample(model: Zoo) -> Tensor:
    """The gradient of every sample by itself."""

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model.linear, parameters, x).square().sum()

    parameters = dict(model.linear.named_parameters())
    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X[0])["weight"]


def cubes(x: Tensor) -> Tensor:
    return x.pow(3).sum()


def by_autograd(model: Zoo) -> Tensor:
    loss = model.linear(X).square().sum()
    return flat(torch.autograd.grad(loss, list(model.linear.parameters())))


@cache
def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


@torch.compile(backend="eager")
def compiled_slopes(weight: Tensor) -> Tensor:
    return torch.func.grad(cubes)(weight)


def averaged(model: Zoo) -> Tensor:
    average = swa_utils.AveragedModel(nn.Linear(4, 4))
    average.update_parameters(model.linear)
    return flat(average.module.parameters())


def weight(model: Zoo) -> nn.Parameter:
    return model.linear.weight


def copied(model: Zoo, optimizer: Optimizer) -> Tensor:
    return flat(s["exp_avg"] for s in copy.deepcopy(optimizer).state.values())


# After step(): parameters, and the optimizer's state
READS: dict[str, Read] = {
    # modules
    "forward": lambda m, o: m(X),
    "evaluation": lambda m, o: evaluated(m, X),
    "Linear": lambda m, o: m.linear(X),
    "Embedding": lambda m, o: m.embed(torch.arange(6)),
    "Conv1d": lambda m, o: m.conv(X.mT),
    "LSTM": lambda m, o: m.lstm(X)[0],
    "LSTM, evaluated": lambda m, o: evaluated(m.lstm, X),
    "MultiheadAttention": lambda m, o: m.attention(X, X, X)[0],
    "MultiheadAttention, evaluated": lambda m, o: evaluated(m.attention, X, X, X),
    "TransformerEncoderLayer": lambda m, o: m.layer(X),
    "TransformerEncoderLayer, evaluated": lambda m, o: evaluated(m.layer, X),
    "LayerNorm": lambda m, o: m.norm(X),
    "a module of autograd.Function": lambda m, o: m.opaque(X),
    "a list of parameters": lambda m, o: X @ m.raw[1],
    "a compiled module": lambda m, o: compiled(m.linear)(X),
    "a module traced now": lambda m, o: torch.jit.trace(m.linear, X, check_trace=False)(X),
    "another thread": lambda m, o: in_thread(lambda: m.linear(X)),
    "checkpointed": lambda m, o: checkpoint(m.linear, X, use_reentrant=False),
    # functions
    "F.linear": lambda m, o: F.linear(X, weight(m)),
    "F.linear, by keyword": lambda m, o: F.linear(X, weight=weight(m)),
    "F.embedding": lambda m, o: F.embedding(torch.arange(6), m.embed.weight),
    "F.conv1d": lambda m, o: F.conv1d(X.mT, m.conv.weight),
    "F.layer_norm": lambda m, o: F.layer_norm(X, (4,), m.norm.weight, m.norm.bias),
    "einsum": lambda m, o: torch.einsum("bij,kj->bik", X, weight(m)),
    "torch.ops": lambda m, o: torch.ops.aten.mul.Tensor(weight(m), 2),
    "autograd.Function.apply": lambda m, o: Unseen.apply(X[0], weight(m)),
    "autograd.grad": lambda m, o: by_autograd(m),
    "functional_call": lambda m, o: torch.func.functional_call(m, dict(m.named_parameters()), X),
    "functional_call under grad": lambda m, o: functional(m, torch.func.grad),
    "functional_call under jacrev": lambda m, o: functional(m, torch.func.jacrev),
    "vmap": lambda m, o: torch.func.vmap(torch.sum)(weight(m)),
    "vmap over something else": lambda m, o: torch.func.vmap(torch.mv, (None, 0))(weight(m), X[0]),
    "vmap of an ensemble": lambda m, o: ensemble(m),
    "vmap of grad": lambda m, o: each_sample(m),
    "func.grad": lambda m, o: torch.func.grad(cubes)(weight(m)),
    "func.grad, compiled": lambda m, o: compiled_slopes(weight(m)),
    "func.grad, closed over": lambda m, o: torch.func.grad(lambda x: cubes(x @ weight(m)))(X[0]),
    "func.vjp": lambda m, o: torch.func.vjp(cubes, weight(m))[1](torch.ones(()))[0],
    "func.jvp": lambda m, o: torch.func.jvp(cubes, (weight(m),), (torch.ones(4, 4),))[1],
    "func.jacrev": lambda m, o: torch.func.jacrev(cubes)(weight(m)),
    "func.jacfwd": lambda m, o: torch.func.jacfwd(cubes)(weight(m)),
    "func.hessian": lambda m, o: torch.func.hessian(cubes)(weight(m)),
    "func.functionalize": lambda m, o: torch.func.functionalize(cubes)(weight(m)),
    "autograd.functional": lambda m, o: torch.autograd.functional.jacobian(cubes, weight(m)),
    # operators
    "+": lambda m, o: weight(m) + 1,
    "+ from the left": lambda m, o: 1 + weight(m),
    "-": lambda m, o: torch.ones(4, 4) - weight(m),
    "- from the left": lambda m, o: weight(m) - torch.ones(4, 4),
    "@": lambda m, o: weight(m) @ torch.ones(4),
    "@ from the left": lambda m, o: torch.ones(4) @ weight(m),
    "**": lambda m, o: 2 ** weight(m),
    "negation": lambda m, o: -weight(m),
    "comparison": lambda m, o: weight(m).detach().clone() * (weight(m) == weight(m)),
    "an ndarray from the left": lambda m, o: torch.tensor(np.ones(4) * weight(m).detach().numpy()),
    # parts
    "indexing": lambda m, o: weight(m)[0],
    "slicing": lambda m, o: weight(m)[1:, ::2],
    "a mask": lambda m, o: weight(m)[torch.eye(4) > 0],
    "iteration": lambda m, o: flat(iter(weight(m))),
    "unbind": lambda m, o: flat(weight(m).unbind()),
    "view": lambda m, o: weight(m).view(-1),
    "transposition": lambda m, o: weight(m).T,
    # values
    "data": lambda m, o: weight(m).data,
    "detach": lambda m, o: weight(m).detach(),
    "clone": lambda m, o: weight(m).clone(),
    "to": lambda m, o: weight(m).to(torch.float64),
    "half": lambda m, o: weight(m).half(),
    "item": lambda m, o: torch.tensor(weight(m)[0, 0].item()),
    "float": lambda m, o: torch.tensor(float(weight(m).detach().sum())),
    "tolist": lambda m, o: torch.tensor(weight(m).tolist()),
    "numpy": lambda m, o: torch.from_numpy(weight(m).detach().numpy().copy()),
    "numpy by force": lambda m, o: torch.from_numpy(weight(m).numpy(force=True).copy()),
    "np.asarray": lambda m, o: torch.from_numpy(np.asarray(weight(m).detach()).copy()),
    "torch.asarray": lambda m, o: torch.asarray(weight(m)),
    "torch.as_tensor": lambda m, o: torch.as_tensor(weight(m)),
    "as_subclass": lambda m, o: weight(m).as_subclass(Tensor),
    "DLPack": lambda m, o: torch.from_dlpack(weight(m).detach()).clone(),
    "DLPack to numpy": lambda m, o: torch.tensor(np.from_dlpack(weight(m).detach()).copy()),
    "data_ptr": lambda m, o: at_address(weight(m)),
    "untyped_storage": lambda m, o: torch.tensor(weight(m).untyped_storage().tolist()),
    "repr": lambda m, o: shown(weight(m)),
    "format": lambda m, o: torch.tensor(list(f"{weight(m)[0, 0]}".encode())),
    # several at once
    "parameters": lambda m, o: flat(m.parameters()),
    "named_parameters": lambda m, o: flat(p for _, p in m.named_parameters()),
    "param_groups": lambda m, o: flat(p for group in o.param_groups for p in group["params"]),
    "state_dict": lambda m, o: flat(m.state_dict().values()),
    "state_dict of a part": lambda m, o: flat(m.linear.state_dict().values()),
    "stack": lambda m, o: torch.stack([weight(m), m.raw[0]]),
    "cat": lambda m, o: torch.cat((weight(m), m.raw[0])),
    "foreach": lambda m, o: flat(torch._foreach_add([p.detach() for p in m.parameters()], 1)),
    "foreach of parameters": lambda m, o: flat(torch._foreach_norm(list(m.parameters()))),
    "EMA": lambda m, o: average(m),
    "AveragedModel": lambda m, o: averaged(m),
    "copy_": lambda m, o: torch.zeros(4, 4).copy_(weight(m)),
    "get_total_norm": lambda m, o: nn.utils.get_total_norm(list(m.parameters())),
    "parameters_to_vector": lambda m, o: nn.utils.parameters_to_vector(m.parameters()),
    "a penalty": lambda m, o: sum((p.square().sum() for p in m.parameters()), torch.zeros(())),
    # copies
    "copy": lambda m, o: copy.copy(weight(m)),
    "deepcopy": lambda m, o: copy.deepcopy(weight(m)),
    "deepcopy of the model": lambda m, o: flat(copy.deepcopy(m).parameters()),
    "pickle": lambda m, o: pickle.loads(pickle.dumps(weight(m))),
    "pickle of the model": lambda m, o: flat(pickle.loads(pickle.dumps(m)).parameters()),
    "save": lambda m, o: reloaded(weight(m)),
    "save of a view": lambda m, o: reloaded(weight(m)[1]),
    "save of the model": lambda m, o: flat(reloaded(m).parameters()),
    "save of a state_dict": lambda m, o: flat(reloaded(m.state_dict()).values()),
    # the user's own collectives
    "all_gather": lambda m, o: gathered(weight(m)),
    "broadcast": lambda m, o: broadcast(weight(m)),
    # the optimizer
    "optimizer.state": lambda m, o: flat(s["exp_avg"] for s in o.state.values()),
    "optimizer.state_dict": lambda m, o: flat(
        s["exp_avg"] for s in o.state_dict()["state"].values()
    ),
    "deepcopy of the optimizer": copied,
}

# What was taken before step() and is read after it: these share the parameter's memory
KEPT: dict[str, tuple[Callable[[Zoo], Any], Callable[[Any], Tensor]]] = {
    "a view kept": (lambda m: weight(m).view(-1), lambda kept: kept),
    "a slice kept": (lambda m: weight(m)[1:].T, lambda kept: kept),
    "data kept": (lambda m: weight(m).data, lambda kept: kept),
    "a state_dict kept": (lambda m: m.state_dict(), lambda kept: flat(kept.values())),
    "an array kept": (lambda m: weight(m).detach().numpy(), lambda kept: torch.tensor(kept)),
    "DLPack kept": (lambda m: torch.from_dlpack(weight(m).detach()), lambda kept: kept),
}


def logged(model: nn.Module) -> Tensor:
    return torch.tensor(
        [p.grad.abs().mean() for _, p in model.named_parameters() if p.grad is not None]
    )


def grad(model: Zoo) -> Any:
    return model.linear.weight.grad


def all_grads(model: Zoo) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def unscaled(model: Zoo, optimizer: Optimizer) -> Tensor:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    return flat(all_grads(model))


def clipped_by_value(model: Zoo) -> Tensor:
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    return flat(all_grads(model))


# Between backward() and step(): gradients
GRADIENT_READS: dict[str, Read] = {
    "clip_grad_norm_": lambda m, o: nn.utils.clip_grad_norm_(m.parameters(), float("inf")),
    "clip_grad_norm_, one by one": lambda m, o: nn.utils.clip_grad_norm_(
        m.parameters(), float("inf"), foreach=False
    ),
    "clip_grad_value_": lambda m, o: clipped_by_value(m),
    "unscale_": unscaled,
    "get_total_norm of gradients": lambda m, o: nn.utils.get_total_norm(all_grads(m)),
    "logging": lambda m, o: logged(m),
    "all gradients": lambda m, o: flat(all_grads(m)),
    "a tied parameter": lambda m, o: m.embed.weight.grad.clone(),  # type: ignore[union-attr]
    "grad.norm": lambda m, o: grad(m).norm(),
    "grad.data": lambda m, o: grad(m).data,
    "grad.detach": lambda m, o: grad(m).detach(),
    "grad.clone": lambda m, o: grad(m).clone(),
    "grad.to": lambda m, o: grad(m).to(torch.float64),
    "grad + 1": lambda m, o: grad(m) + 1,
    "1 - grad": lambda m, o: 1 - grad(m),
    "grad[0]": lambda m, o: grad(m)[0],
    "grad.item": lambda m, o: torch.tensor(grad(m)[0, 0].item()),
    "grad.tolist": lambda m, o: torch.tensor(grad(m).tolist()),
    "grad.numpy": lambda m, o: torch.from_numpy(grad(m).numpy().copy()),
    "grad by np.asarray": lambda m, o: torch.from_numpy(np.asarray(grad(m)).copy()),
    "grad by DLPack": lambda m, o: torch.from_dlpack(grad(m)).clone(),
    "grad.data_ptr": lambda m, o: at_address(grad(m)),
    "repr of grad": lambda m, o: shown(grad(m)),
    "deepcopy of grad": lambda m, o: copy.deepcopy(grad(m)),
    "pickle of grad": lambda m, o: pickle.loads(pickle.dumps(grad(m))),
    "save of grad": lambda m, o: reloaded(grad(m)),
    "stack of gradients": lambda m, o: torch.stack([grad(m), m.raw[0].grad]),  # type: ignore[list-item]
    "foreach of gradients": lambda m, o: flat(torch._foreach_norm(all_grads(m))),
    "vector of gradients": lambda m, o: nn.utils.parameters_to_vector(all_grads(m)),
    "copy_ of grad": lambda m, o: torch.zeros(4, 4).copy_(grad(m)),
    "all_gather of grad": lambda m, o: gathered(grad(m)),
    "grad in another thread": lambda m, o: in_thread(lambda: grad(m).clone()),
}


def copied_by(constructor: Callable[[Any], Tensor]) -> Read:
    def read(model: Zoo, optimizer: Optimizer) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return constructor(weight(model)).detach().clone()

    return read


@torch.jit.script
def doubled(x: Tensor) -> Tensor:
    return x * 2


# What C++ takes without asking anybody. docs/safety.md names them: call handle.flush() before.
HOLES: dict[str, Read] = {
    "torch.tensor": copied_by(torch.tensor),
    "torch.Tensor": copied_by(torch.Tensor),
    "new_tensor": copied_by(lambda p: torch.ones(1).new_tensor(p)),
    "nested_tensor": copied_by(lambda p: torch.nested.nested_tensor([p]).unbind()[0]),
    "set_": copied_by(lambda p: torch.empty(0).set_(p)),
    "torch.as_tensor(p, dtype=...)": copied_by(lambda p: torch.as_tensor(p, dtype=torch.float64)),
    "torch.asarray(p, dtype=...)": copied_by(lambda p: torch.asarray(p, dtype=torch.float64)),
    "torch.jit.script": lambda m, o: doubled(weight(m)),
}
