"""Actions: copies, saved states, buffers, collective calls, and what the user keeps of it all."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fuzz.loops import action
from fuzz.run import Run

_PLACES = tuple(range(6))


@action("between", how=("deepcopy", "save", "both", "save optimizer", "one"))
def copy_it(run: Run, how: str) -> None:
    """A copy is made, and used."""
    if how == "save optimizer":
        file = io.BytesIO()
        torch.save([run.model.state_dict(), [p.detach() for p in run.parameters()]], file)
        file.seek(0)
        run.outputs.append(torch.load(file)[1])
        return
    if how == "one":
        file = io.BytesIO()
        torch.save(run.parameter(1), file)
        run.outputs.append(len(file.getvalue()) < 4000)
        run.outputs.append(run.parameter(1).untyped_storage().nbytes())
        return
    if how == "deepcopy":
        twin = copy.deepcopy(run.model)
    elif how == "save":
        file = io.BytesIO()
        torch.save(run.model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin, optimizer = copy.deepcopy((run.model, run.optimizer))
        optimizer.zero_grad()
        twin(torch.ones(2, 6)).square().sum().backward()
        if run.loop.optimizer != "lbfgs":
            optimizer.step()
    run.outputs.append([p.detach().clone() for p in twin.parameters()])
    run.outputs.append(twin.eval()(torch.ones(2, 6)).detach())


@action("between", how=("keep", "keep", "load", "load", "assign", "through a file", "as it is"))
def model_state(run: Run, how: str) -> None:
    """The model's state is kept, or put back."""
    state = run.model.state_dict()
    if how == "keep":
        run.memory["model"] = copy.deepcopy(state)
        return
    saved = run.memory.get("model", {})
    fits = saved.keys() == state.keys() and all(saved[n].shape == state[n].shape for n in state)
    if how == "through a file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        run.model.load_state_dict(torch.load(file))
    elif how == "as it is":
        run.model.load_state_dict(state)
    elif how == "assign":
        run.has_orphans = True
        names = {id(p): name for name, p in run.model.named_parameters()}
        run.model.load_state_dict(copy.deepcopy(state), assign=True)
        now = dict(run.model.named_parameters())
        for group in run.optimizer.param_groups:
            group["params"] = [now.get(names.get(id(p), ""), p) for p in group["params"]]
        run.stale = True
    elif fits:
        run.model.load_state_dict(saved)


@action("between", how=("keep", "load", "as it is", "through a file"))
def optimizer_state(run: Run, how: str) -> None:
    """The optimizer's state is kept, or put back."""
    handle = run.arm.handle
    state = handle.optimizer_state_dict() if handle else run.optimizer.state_dict()
    if how == "keep":
        run.memory["optimizer"] = copy.deepcopy(state)
    elif how == "as it is":
        run.optimizer.load_state_dict(state)
    elif how == "through a file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        run.optimizer.load_state_dict(torch.load(file))
    elif "optimizer" in run.memory:
        run.optimizer.load_state_dict(copy.deepcopy(run.memory["optimizer"]))


@action("between", "state", how=("momentum", "lr", "clear"))
def write_state(run: Run, how: str) -> None:
    """Entries of the optimizer's state are changed by hand."""
    if how == "clear":
        run.optimizer.state.clear()
    for state in run.optimizer.state.values():
        for key, value in state.items():
            if how == "momentum" and isinstance(value, Tensor) and value.dim():
                value.mul_(0.5)
            elif how == "lr" and key == "momentum_buffer" and value is not None:
                state[key] = 0.5 * value


@action("between", how=("reset", "in place", "replaced", "broadcast"))
def write_buffers(run: Run, how: str) -> None:
    for module in run.model.modules():
        if how == "reset" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    for module in run.model.modules():
        for name, b in list(module.named_buffers(recurse=False)):
            if how == "in place":
                b.add_(1)
            elif how == "replaced":
                setattr(module, name, b.clone())
            elif how == "broadcast":
                dist.broadcast(b, 0)


@action(
    "between",
    how=("loss", "broadcast weights", "async", "barrier", "object", "gather", "average weights"),
)
def collective(run: Run, how: str) -> None:
    """Collective calls of the user's own."""
    if how == "loss" and run.outputs and isinstance(run.outputs[-1], Tensor):
        mean = run.outputs[-1].clone()
        dist.all_reduce(mean)
        run.outputs.append(mean)
    elif how == "barrier":
        dist.barrier()
    elif how == "object":
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, len(run.outputs))
        run.outputs.append(every)
    elif how == "async":
        work = dist.all_reduce(torch.ones(3), async_op=True)
        assert work is not None
        run.memory.setdefault("works", []).append(work)
        if len(run.memory["works"]) > 1:
            run.memory["works"].pop(0).wait()
    for p in run.parameters() if how in ("broadcast weights", "average weights", "gather") else ():
        if how == "broadcast weights":
            dist.broadcast(p.data, 0)
        elif how == "average weights":
            dist.all_reduce(p.data)
            p.data.div_(dist.get_world_size())
        else:
            other = [torch.empty_like(p.data) for _ in range(dist.get_world_size())]
            dist.all_gather(other, p.data.contiguous())
            run.outputs.append(other)


@action(
    "between", "gradient", place=_PLACES,
    what=(
        "data", "detach", "view", "state_dict", "gradient", "buffer", "numpy", "state",
        "transposed", "list", "clone",
    ),
)  # fmt: skip
def keep(run: Run, what: str, place: int) -> None:
    """The user keeps something that shares memory with the model, and looks at it later."""
    p = run.parameter(place)
    if what == "data":
        kept = p.data
        run.kept[what] = lambda: kept
    elif what == "detach":
        kept = [q.detach() for q in run.parameters()]
        run.kept[what] = lambda: kept
    elif what == "view":
        kept = p.data.view(-1)
        run.kept[what] = lambda: kept
    elif what == "transposed":
        kept = p.detach().t() if p.dim() == 2 else p.detach()[...]
        run.kept[what] = lambda: kept
    elif what == "state_dict":
        kept = run.model.state_dict()
        run.kept[what] = lambda: kept
    elif what == "gradient" and p.grad is not None:
        run.kept_gradients["gradient"] = p.grad
    elif what == "buffer":
        kept = list(run.model.buffers())
        run.kept[what] = lambda: kept
    elif what == "numpy":
        kept = p.detach().numpy()
        run.kept[what] = lambda: torch.from_numpy(kept.copy())
    elif what == "list":
        kept = list(run.model.parameters())
        run.kept[what] = lambda: kept
    elif what == "clone":
        kept = [q.clone() for q in run.parameters()]
        run.kept[what] = lambda: [q.detach() for q in kept]
    elif what == "state" and p in run.optimizer.state:
        kept = [v for v in run.optimizer.state[p].values() if isinstance(v, Tensor)]
        run.kept[what] = lambda: kept
