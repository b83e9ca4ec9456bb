"""Loops in which memory, gradients, groups and buffers are the user's, in all forms of soonest."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

import soonest

FORMS = ("prioritize", "drop-in", "both", "sharded")
STEPS = 14


class Run:
    """A training in one form, and all that has been seen of it.

    Args:
        form: ``ddp``, or one of ``FORMS``.
    """

    def __init__(self, form: str) -> None:
        self.form = form
        self.seen: list[Any] = []
        self.gradients: list[Any] = []
        self.handle: soonest.Handle | None = None
        self._data = torch.Generator().manual_seed(dist.get_rank())

    @property
    def sharded(self) -> bool:
        return self.form == "sharded"

    def share(self, model: nn.Module, optimizer: Any, given: Any = None, **ddp: Any) -> None:
        """Trains them over the ranks.

        Args:
            given: to prioritize instead of the optimizer.
            ddp: arguments of DistributedDataParallel.
        """
        self.model, self.optimizer, self._given, self._ddp = model, optimizer, given, ddp
        self.net: nn.Module = model
        if self.form in ("prioritize", "sharded"):
            options = {"shard_optimizer": True} if self.sharded else {}
            self.handle = soonest.prioritize(model, given or optimizer, **options)
        else:
            self.wrap_anew()

    def wrap_anew(self) -> None:
        """After the model has changed; prioritize notices by itself."""
        if self.form in ("prioritize", "sharded"):
            return
        kind: Any = (
            DistributedDataParallel if self.form == "ddp" else soonest.DistributedDataParallel
        )
        self.net = kind(self.model, **self._ddp)
        if self.form == "both":
            self.handle = self.net.prioritize(self._given or self.optimizer)  # type: ignore[operator]

    def x(self, size: int = 8) -> Tensor:
        return torch.randn(size, 6, generator=self._data)

    def backward(self, *inputs: Any) -> None:
        self.net(self.x(), *inputs).square().mean().backward()

    def note(self, *tensors: Tensor | None) -> None:
        """Remembers values as they are now."""
        self.seen += [None if t is None else t.detach().clone() for t in tensors]

    def no_sync(self) -> Any:
        """Within this context, passes only accumulate gradients on this rank."""
        return self.net.no_sync() if self.handle is None else self.handle.no_sync()  # type: ignore[operator]

    def note_gradients(self) -> None:
        """The same of all gradients, where a rank has all of them."""
        if not self.sharded:
            for p in self.model.parameters():
                self.gradients.append(None if p.grad is None else p.grad.clone())

    def step(self, *inputs: Any, between: Callable[[], Any] = lambda: None) -> None:
        self.optimizer.zero_grad()
        self.backward(*inputs)
        between()
        self.optimizer.step()

    def train(self, after: Callable[[int], Any], steps: int = STEPS) -> None:
        for number in range(steps):
            self.step()
            after(number)

    def outcome(self) -> dict[str, Any]:
        """All that can be read at the end, by what it is."""
        parameters = list(self.model.parameters())
        values = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        self.note_gradients()
        if self.handle is not None:
            self.handle.detach()
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        state = [{**inner.state[p]} for p in parameters if p in inner.state]
        return {"seen": self.seen, "values": values, "gradients": self.gradients, "state": state}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)
    )


def adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=0.01)


def plain(run: Run) -> None:
    model = mlp()
    run.share(model, adam(model))


# Memory of parameters


def averages_swapped(run: Run) -> None:
    """Averaged weights are put into the model by ``.data``, and the real ones put back."""
    plain(run)
    average = [p.data.clone() for p in run.model.parameters()]

    def after(number: int) -> None:
        for a, p in zip(average, run.model.parameters(), strict=True):
            a.lerp_(p.data, 0.1)
        if number % 3 == 2:
            kept = [p.data for p in run.model.parameters()]
            for a, p in zip(average, run.model.parameters(), strict=True):
                p.data = a
            with torch.no_grad():
                run.note(run.net(torch.ones(1, 6)))
            for k, p in zip(kept, run.model.parameters(), strict=True):
                p.data = k

    run.train(after)
    run.note(*average)


def averages_taken_over(run: Run) -> None:
    """Training goes on in the memory of the averaged weights, as it does in lookahead."""
    plain(run)
    slow = [p.data.clone() for p in run.model.parameters()]

    def after(number: int) -> None:
        if number % 3 == 2:
            for s, p in zip(slow, run.model.parameters(), strict=True):
                s.lerp_(p.data, 0.5)
                p.data = s
        run.note(*slow)

    run.train(after)


def moved(move: Callable[[nn.Module], Any], *, anew: bool = False) -> Callable[[Run], None]:
    """Something gives parameters other memory now and then.

    Args:
        anew: torch's own DDP loses sight of them, so they have to be wrapped anew.
    """

    def loop(run: Run) -> None:
        plain(run)

        def after(number: int) -> None:
            if number % 4 == 1:
                run.optimizer.zero_grad()
                move(run.model)
                if anew and run.form == "ddp":
                    run.wrap_anew()

        run.train(after)

    return loop


def cloned(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def set_to_a_clone(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.set_(p.detach().clone())  # type: ignore[call-overload]


def halved_and_back(model: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    model.bfloat16().to(dtype)


def offloaded_and_back(model: nn.Module) -> None:
    for p in model.parameters():
        kept = p.data.clone()
        p.data = torch.empty(0)
        p.data = kept


def rounded_and_back(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = (p.data * 64).round().to(torch.int16).to(p.dtype) / 64


def in_one_vector(model: nn.Module) -> None:
    values = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(values.detach().clone(), model.parameters())


def turned_in_memory(run: Run) -> None:
    """Memory formats change while a convolution is trained; DDP averages wrongly then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (2, 3, 1)), nn.Conv2d(2, 4, (2, 1)), nn.Flatten())
    run.share(model, adam(model))

    def after(number: int) -> None:
        if number in (3, 8):
            formats = {3: torch.channels_last, 8: torch.contiguous_format}
            run.optimizer.zero_grad()
            model.to(memory_format=formats[number])
            if run.form == "ddp":
                run.wrap_anew()

    run.train(after)


def channels_last_from_the_start(run: Run) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (2, 3, 1)), nn.Conv2d(2, 4, (2, 1)), nn.Flatten())
    model.to(memory_format=torch.channels_last)
    run.share(model, adam(model))
    run.train(lambda number: None)


def shared_with_processes(run: Run) -> None:
    """Another process reads the weights between steps; it maps the same memory by itself."""
    model = mlp()
    model[0].share_memory()
    run.share(model, adam(model))
    readers: list[Tensor] = []

    def after(number: int) -> None:
        if number == 5:
            run.optimizer.zero_grad()
            model.share_memory()
        if number in (0, 6):
            readers[:] = [mapped_again(p) for p in model.parameters() if p.is_shared()]
        run.note(*readers)

    run.train(after)


def mapped_again(parameter: Tensor) -> Tensor:
    """What another process has of a tensor in shared memory."""
    handle = parameter.untyped_storage()._share_fd_cpu_()
    storage = torch.UntypedStorage._new_shared_fd_cpu(*handle)
    with torch.no_grad():
        return torch.empty(0, dtype=parameter.dtype).set_(storage).view(parameter.shape)  # type: ignore[call-overload]


def tied(frozen: bool) -> Callable[[Run], None]:
    """Two parameters share their memory without being the same Parameter."""

    def loop(run: Run) -> None:
        model = mlp()
        model.add_module("again", nn.Tanh())
        other = nn.Linear(3, 3)
        model.add_module("last", other)
        model.add_module("twin", nn.Linear(3, 3))
        model.twin.weight.data = other.weight.data
        model.twin.weight.requires_grad_(not frozen)
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        run.share(model, optimizer)
        run.train(lambda number: run.note(model.twin.weight))

    return loop


def a_view_kept(run: Run) -> None:
    """Plain tensors that share the memory of parameters are read after each step."""
    plain(run)
    kept = [p.data.view(-1) for p in run.model.parameters()] + [*run.model.state_dict().values()]
    run.train(lambda number: run.note(*kept))


def state_kept(keep: Callable[[Any], Callable[[], Any]]) -> Callable[[Run], None]:
    """The user keeps what the optimizer's state consists of, and reads it after each step.

    Args:
        keep: returns what gives tensors.
    """

    def loop(run: Run) -> None:
        plain(run)
        run.step()
        kept = keep(run.optimizer)
        run.train(lambda number: run.note(*kept()))

    return loop


def in_order(optimizer: Any, state: Any) -> list[Any]:
    """The states of the optimizer's parameters."""
    return [state[p] for group in optimizer.param_groups for p in group["params"]]


def tensors_of(optimizer: Any) -> Callable[[], Any]:
    states = in_order(optimizer, optimizer.state)
    tensors = [t.view(-1) for values in states for t in values.values()]
    return lambda: tensors


def states_of(optimizer: Any) -> Callable[[], Any]:
    states = in_order(optimizer, optimizer.state)
    return lambda: [t for values in states for t in values.values()]


def all_of(optimizer: Any) -> Callable[[], Any]:
    state = optimizer.state
    return lambda: [t for values in in_order(optimizer, state) for t in values.values()]


def saved_of(optimizer: Any) -> Callable[[], Any]:
    saved = optimizer.state_dict()["state"]
    return lambda: [t for number in sorted(saved) for t in saved[number].values()]


def storages(run: Run) -> None:
    """What is saved of one parameter is that parameter."""
    plain(run)

    def after(number: int) -> None:
        for p in run.model.parameters():
            buffer = io.BytesIO()
            torch.save(p.data, buffer)
            run.seen.append((p.untyped_storage().nbytes(), p.storage_offset(), p.stride()))
            run.seen.append(buffer.tell())

    run.train(after)


# Gradients


class Branches(nn.Module):
    """Two heads, of which each pass uses one, or both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 3), nn.Linear(24, 3)

    def forward(self, x: Tensor, heads: str = "ab") -> Tensor:
        h = torch.tanh(self.stem(x))
        return sum((getattr(self, head)(h) for head in heads), torch.zeros(()))


def branches(run: Run) -> None:
    model = Branches()
    run.share(model, SGD(model.parameters(), lr=0.1, momentum=0.9), find_unused_parameters=True)


def gradients_of_two_tasks(clone: bool) -> Callable[[Run], None]:
    """Each task's gradients are taken by a backward pass of their own, and combined by hand."""

    def loop(run: Run) -> None:
        branches(run)
        for _ in range(STEPS):
            kept: list[list[Tensor | None]] = []
            for head in "ab":
                run.optimizer.zero_grad()
                run.backward(head)
                own = [p.grad for p in run.model.parameters()]
                kept.append([g.clone() if clone and g is not None else g for g in own])
            run.optimizer.zero_grad()
            for p, *grads in zip(run.model.parameters(), *kept, strict=True):
                some = [g for g in grads if g is not None]
                p.grad = some[0] if len(some) == 1 else some[0] + some[1]
            run.optimizer.step()
            run.note(*run.model.parameters())

    return loop


def heads_of(number: int) -> str:
    """Which heads this rank uses: all of them, by rank, or the same one."""
    return ("ab", "ab"[dist.get_rank() % 2], "a", "b")[number % 4]


def cleared_by_hand(when: str) -> Callable[[Run], None]:
    """``p.grad = None`` instead of ``zero_grad()``, of all parameters or of one head."""

    def loop(run: Run) -> None:
        branches(run)

        def clear(*modules: nn.Module) -> None:
            for module in modules:
                for p in module.parameters():
                    p.grad = None

        for number in range(STEPS):
            if when == "before":
                clear(run.model)
            elif when != "after":
                run.optimizer.zero_grad()
            run.backward(heads_of(number))
            if when == "between" and number % 3 != 2:
                clear(run.model.b)
            run.optimizer.step()
            if when == "after":
                clear(run.model)
            if number % 5 == 4:
                run.note(*run.model.parameters())
                run.note_gradients()

    return loop


def kept_by_some(run: Run) -> None:
    """A pass that uses a head on no rank follows one that did; ranks have changed its gradient."""
    branches(run)
    for number in range(STEPS):
        run.optimizer.zero_grad()
        run.backward("ab")
        if number % 3 == 1 and dist.get_rank() == 1:
            run.model.b.weight.grad = None
        run.model.b.bias.grad.mul_(1 + dist.get_rank())
        run.backward("a")
        run.note_gradients()
        if number % 2:
            run.optimizer.zero_grad()  # or ranks would drift apart, as they do there
            run.backward("ab")
        else:
            run.model.b.zero_grad()
        run.optimizer.step()
        run.note(*run.model.parameters())


def replaced(replace: Callable[[nn.Module], Any]) -> Callable[[Run], None]:
    """Gradients are replaced between ``backward()`` and ``step()``."""

    def loop(run: Run) -> None:
        plain(run)
        for _ in range(STEPS):
            run.step(between=lambda: replace(run.model))

    return loop


def doubled(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad * 2


def one_for_two(model: Any) -> None:
    model[2].bias.grad = model[0].bias.grad


def sparse(model: Any) -> None:
    model[0].weight.grad = model[0].weight.grad.to_sparse().to_dense()


def own_gradients(run: Run) -> None:
    """The user makes the gradients, keeps them, and reads them and views of them each time."""
    plain(run)
    own = [torch.zeros_like(p) for p in run.model.parameters()]
    for g, p in zip(own, run.model.parameters(), strict=True):
        p.grad = g
    rows = [g.view(-1) for g in own]
    for _ in range(STEPS):
        run.optimizer.zero_grad(set_to_none=False)
        run.backward()
        run.note(*rows, *own)
        run.optimizer.step()


def gradients_kept(run: Run) -> None:
    """Gradients of earlier steps, and views of them, are read later."""
    plain(run)
    kept: list[Tensor] = []
    for number in range(STEPS):
        run.optimizer.zero_grad()
        run.backward()
        for p in run.model.parameters():
            assert p.grad is not None
            kept.append(p.grad if number % 2 else p.grad.view(-1)[1:])
        run.optimizer.step()
    run.note(*kept)


def accumulated(run: Run) -> None:
    """Several backward passes, each combined, before a step; gradients are not cleared between."""
    plain(run)
    for number in range(STEPS):
        if number % 3 == 0:
            run.optimizer.zero_grad(set_to_none=number % 2 == 0)
        run.backward()
        if number % 3 == 2:
            run.optimizer.step()


# Groups and optimizers


def layer_replaced(one_by_one: bool) -> Callable[[Run], None]:
    """A layer is replaced, and the optimizer's list of parameters overwritten."""

    def loop(run: Run) -> None:
        model = mlp()
        run.share(model, SGD(model.parameters(), lr=0.1, momentum=0.9))

        def after(number: int) -> None:
            if number == 5:
                model[4] = nn.Linear(24, 3)
                group = run.optimizer.param_groups[0]
                if one_by_one:
                    group["params"][-2:] = model[4].parameters()
                else:
                    group["params"] = list(model.parameters())
                run.wrap_anew()

        run.train(after)

    return loop


def groups_changed(run: Run) -> None:
    """Parameters change places between groups, and groups change theirs."""
    model = mlp()
    groups = [
        {"params": [*model[0].parameters(), *model[2].parameters()], "lr": 0.1},
        {"params": [*model[4].parameters()], "lr": 0.01, "momentum": 0.9},
    ]
    run.share(model, SGD(groups, lr=0.1))

    def after(number: int) -> None:
        one, other = run.optimizer.param_groups
        if number == 4:
            other["params"].append(one["params"].pop())
        if number == 8:
            one["params"], other["params"] = other["params"], one["params"]

    run.train(after)


def module_with_an_optimizer_of_its_own(run: Run) -> None:
    """A new module comes with an optimizer that soonest was never given."""
    plain(run)
    others: list[Optimizer] = []

    def after(number: int) -> None:
        for other in others:
            other.step()
            other.zero_grad()
        if number == 5:
            run.model.add_module("more", nn.Sequential(nn.Tanh(), nn.Linear(3, 2)))
            with torch.no_grad():
                run.model.more[1].bias.add_(dist.get_rank())
            others.append(SGD(run.model.more.parameters(), lr=0.1))
            run.wrap_anew()

    run.train(after)


class Marked(nn.Parameter):
    """As many libraries make them, with a word about the parameter on it."""


def subclass_unfrozen(run: Run) -> None:
    model = mlp()
    model[2].weight = Marked(model[2].weight.detach(), requires_grad=False)
    run.share(model, adam(model))

    def after(number: int) -> None:
        if number == 5:
            model[2].weight.requires_grad_()
            run.wrap_anew()

    run.train(after)


class Wrapper(Optimizer):
    """Derives from torch's class without making itself one, as frameworks' do."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class Lookahead:
    """No optimizer at all, but it has one; every third step goes half-way back."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self._count = optimizer, 0
        self._slow = [p.data.clone() for p in self._parameters()]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.optimizer.step()
        self._count += 1
        if self._count % 3 == 0:
            for index, p in enumerate(self._parameters()):
                self._slow[index] = self._slow[index] + (p.data - self._slow[index]) * 0.5
                p.data = self._slow[index].clone()


def wrapped(make: Callable[[Optimizer], Any]) -> Callable[[Run], None]:
    def loop(run: Run) -> None:
        model = mlp()
        wrapper = make(adam(model))
        run.share(model, wrapper, wrapper)
        run.train(lambda number: None)

    return loop


def step_replaced(wrap: Callable[[Any], Any], *, before: bool) -> Callable[[Run], None]:
    """``optimizer.step`` is wrapped on the instance."""

    def loop(run: Run) -> None:
        model = mlp()
        optimizer = adam(model)
        if before:
            optimizer.step = wrap(optimizer.step)  # type: ignore[method-assign]
        run.share(model, optimizer)
        if not before:
            optimizer.step = wrap(optimizer.step)  # type: ignore[method-assign]
        run.train(lambda number: None)

    return loop


def in_closure(step: Any) -> Any:
    return lambda closure=None: step(closure)


def in_default(step: Any) -> Any:
    def again(closure: Any = None, step: Any = step) -> Any:
        return step(closure)

    return again


def step_kept_from_before(run: Run) -> None:
    model = mlp()
    optimizer = adam(model)
    step = optimizer.step
    run.share(model, optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        run.backward()
        step()


# Buffers and evaluation


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 24),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.Linear(24, 8),
        nn.BatchNorm1d(8, affine=False),
    )


def with_buffers(after: Callable[[Run, int], Any], passes: int = 1) -> Callable[[Run], None]:
    def loop(run: Run) -> None:
        model = normalised()
        run.share(model, SGD(model.parameters(), lr=0.05, momentum=0.9))
        for number in range(STEPS):
            run.optimizer.zero_grad()
            losses = [run.net(run.x()).square().mean() for _ in range(passes)]
            torch.stack(losses).sum().backward()
            run.optimizer.step()
            run.note(*model.buffers())
            after(run, number)

    return loop


def evaluated(run: Run, number: int) -> None:
    if number % 3 == 2:
        run.net.eval()
        with torch.no_grad():
            run.note(*(run.net(run.x()) for _ in range(3)))
        run.net.train()


def statistics_renewed(run: Run, number: int) -> None:
    """As ``update_bn`` does it."""
    if number % 4 == 3:
        with torch.no_grad():
            run.note(*(run.net(run.x()) for _ in range(3)))


def evaluated_with_gradients(run: Run, number: int) -> None:
    if number % 3 == 2:
        run.note(*(run.net(run.x()) for _ in range(3)))


def module_put_in(run: Run, number: int) -> None:
    if number == 5:
        run.model[4] = nn.BatchNorm1d(8, affine=False)
        run.wrap_anew()


def buffer_replaced(run: Run, number: int) -> None:
    if number % 3 == 1:
        run.model[1].running_mean = torch.full((24,), float(dist.get_rank() + number))


def buffer_added(run: Run, number: int) -> None:
    if number == 4:
        run.model.register_buffer("late", torch.full((3,), float(dist.get_rank())))


def evaluated_on_one_rank(run: Run, number: int) -> None:
    if number % 4 == 1 and dist.get_rank() == 0:
        run.model.eval()
        with torch.no_grad():
            (run.model if run.form != "ddp" else run.net.module)(torch.ones(2, 6))
        run.model.train()


def encoder(run: Run) -> None:
    """torch takes another way through an encoder where a parameter is no plain tensor."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Unflatten(1, (1, 6)), layer, nn.Linear(6, 3))
    run.share(model, SGD(model.parameters(), lr=0.1))
    taken: list[int] = []
    fast = torch._transformer_encoder_layer_fwd

    def counting(*args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        return fast(*args, **kwargs)

    def after(number: int) -> None:
        run.net.eval()
        with torch.no_grad():
            run.note(run.net(run.x()))
        run.net.train()

    torch._transformer_encoder_layer_fwd = counting
    try:
        run.train(after)
    finally:
        torch._transformer_encoder_layer_fwd = fast
    run.seen.append(len(taken))


LOOPS: dict[str, Callable[[Run], None]] = {
    "averages swapped in and out by .data": averages_swapped,
    "memory of averages taken over": averages_taken_over,
    "p.data = p.data.clone()": moved(cloned),
    "p.set_()": moved(set_to_a_clone, anew=True),
    "another dtype and back": moved(halved_and_back, anew=True),
    "offloaded and back": moved(offloaded_and_back),
    "rounded and back": moved(rounded_and_back),
    "vector_to_parameters": moved(in_one_vector),
    "memory format changed": turned_in_memory,
    "channels_last": channels_last_from_the_start,
    "share_memory": shared_with_processes,
    "tied by .data, one frozen": tied(frozen=True),
    "tied by .data": tied(frozen=False),
    "views of parameters kept": a_view_kept,
    "tensors of the optimizer's state kept": state_kept(tensors_of),
    "states of parameters kept": state_kept(states_of),
    "the optimizer's state kept": state_kept(all_of),
    "a state_dict of the optimizer kept": state_kept(saved_of),
    "storages": storages,
    "gradients of two tasks": gradients_of_two_tasks(clone=True),
    "gradients of two tasks, kept": gradients_of_two_tasks(clone=False),
    "p.grad = None before backward()": cleared_by_hand("before"),
    "p.grad = None before step()": cleared_by_hand("between"),
    "p.grad = None after step()": cleared_by_hand("after"),
    "gradients that only some ranks have kept": kept_by_some,
    "gradients replaced": replaced(doubled),
    "one gradient of two parameters": replaced(one_for_two),
    "gradients made dense": replaced(sparse),
    "the user's own gradients": own_gradients,
    "gradients kept": gradients_kept,
    "several combined passes": accumulated,
    "a layer replaced, the group's list overwritten": layer_replaced(one_by_one=False),
    "a layer replaced, one by one": layer_replaced(one_by_one=True),
    "parameters between groups": groups_changed,
    "a module with an optimizer of its own": module_with_an_optimizer_of_its_own,
    "a subclass of Parameter unfrozen": subclass_unfrozen,
    "wrapper of an optimizer": wrapped(Wrapper),
    "lookahead around an optimizer": wrapped(Lookahead),
    "step in a partial": step_replaced(functools.partial, before=True),
    "step in a closure": step_replaced(in_closure, before=True),
    "step in a default": step_replaced(in_default, before=True),
    "step in a partial, later": step_replaced(functools.partial, before=False),
    "step kept from before": step_kept_from_before,
    "evaluation": with_buffers(evaluated),
    "statistics renewed": with_buffers(statistics_renewed),
    "evaluation with gradients": with_buffers(evaluated_with_gradients),
    "two forward passes": with_buffers(lambda run, number: None, passes=2),
    "a module put in": with_buffers(module_put_in),
    "a buffer replaced": with_buffers(buffer_replaced),
    "a buffer added": with_buffers(buffer_added),
    "evaluation on one rank": with_buffers(evaluated_on_one_rank),
    "encoder": encoder,
}

_NOT_WHOLE = "refused: each rank has its part of the state"
NOT_IN: dict[str, dict[str, str]] = {
    "sharded": {
        "memory format changed": "refused: parts are of the first memory format",
        "tied by .data": "refused: the order of the updates counts",
        "step kept from before": "the optimizer has no state that it could use",
        "gradients of two tasks, kept": "gradients of parts only after the next backward pass",
        "tensors of the optimizer's state kept": _NOT_WHOLE,
        "states of parameters kept": _NOT_WHOLE,
        "the optimizer's state kept": _NOT_WHOLE,
        "a state_dict of the optimizer kept": _NOT_WHOLE,
        "gradients kept": "gradients may be read only between backward() and step()",
        "a module with an optimizer of its own": "that one would read parts of gradients",
    },
}
"""Where a form cannot give what DDP gives, as its documentation says."""


def outcome(name: str, form: str) -> Any:
    run = Run(form)
    LOOPS[name](run)
    return run.outcome()
