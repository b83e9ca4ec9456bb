"""Actions: what is done with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fuzz.loops import action
from fuzz.run import Run

_PLACES = tuple(range(6))
_OFTEN = ("gradient", "between")


@action(
    "zero", "between",
    how=("none", "zero", "model", "model to zero", "by hand", "in place", "detached", "some"),
)  # fmt: skip
def zero(run: Run, how: str) -> None:
    if how in ("none", "zero"):
        run.optimizer.zero_grad(set_to_none=how == "none")
    elif how.startswith("model"):
        run.model.zero_grad(set_to_none=how == "model")
    for place, p in enumerate(run.parameters()):
        if how == "by hand" or (how == "some" and place % 2):
            p.grad = None
        elif how == "in place" and p.grad is not None:
            p.grad.zero_()
        elif how == "detached" and p.grad is not None:
            p.grad.detach_()
            p.grad.zero_()


@action("gradient", norm=(0.1, 1.0, 2.0), by=("norm", "inf", "value", "get_total_norm", "foreach"))
def clip(run: Run, norm: float, by: str) -> None:
    _unscale(run)
    parameters = run.parameters()
    if by == "value":
        nn.utils.clip_grad_value_(parameters, norm / 10)
    elif by == "get_total_norm":
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        nn.utils.clip_grads_with_norm_(parameters, norm, total)
        run.outputs.append(total)
    else:
        kind = float("inf") if by == "inf" else 2.0
        run.outputs.append(
            nn.utils.clip_grad_norm_(parameters, norm, kind, foreach=by == "foreach" or None)
        )


def _unscale(run: Run) -> None:
    if run.loop.setting("scaler") and not run.unscaled:
        run.unscaled = True
        run.scaler.unscale_(run.optimizer)


@action(
    *_OFTEN, place=_PLACES,
    how=("mul_", "data.mul_", "replaced", "data =", "noise", "copy_", "foreach", "alias"),
)  # fmt: skip
def change_gradients(run: Run, place: int, how: str) -> None:
    """Of all parameters; or of one, where it gets that of another of its shape."""
    found = [p.grad for p in run.parameters() if p.grad is not None]
    if how == "foreach" and found:
        torch._foreach_mul_(found, 0.5)
    if how == "alias":
        one = run.parameter(place)
        same = [p for p in run.parameters() if p.shape == one.shape and p.dtype == one.dtype]
        if one.requires_grad:  # for one step: how DDP adds to such depends on the order
            one.grad = same[-1].grad
            run.step()
            one.grad = None
        return
    for p in run.parameters():
        if p.grad is None:
            continue
        if how == "mul_":
            p.grad.mul_(0.5)
        elif how == "data.mul_":
            p.grad.data.mul_(0.5)
        elif how == "replaced":
            p.grad = p.grad * 0.5
        elif how == "data =":
            p.grad.data = p.grad.data * 0.5
        elif how == "noise":
            p.grad.add_(run.drawn_like(p), alpha=0.01)
        elif how == "copy_":
            p.grad.copy_(p.grad.clamp(-0.1, 0.1))


@action(*_OFTEN, of=("unused", "all", "one", "last"), keep=(False, True), adds=(False, True))
def own_gradients(run: Run, of: str, keep: bool, adds: bool) -> None:
    """Gradients that the user has made, the same on all ranks; perhaps he keeps them."""
    found = [p for p in run.parameters() if p.requires_grad]
    if of == "unused":
        found = [p for p in found if p.grad is None]
    elif of in ("one", "last"):
        found = found[-1:] if of == "last" else found[:1]
    for p in found:
        own = run.drawn_like(p)
        p.grad = own if p.grad is None or not adds else p.grad + own
        if keep:
            run.kept["own gradient"] = lambda own=own: own


@action(*_OFTEN, place=_PLACES)
def no_gradient(run: Run, place: int) -> None:
    """A layer's are taken away, as SwAV does with its prototypes at first."""
    for p in run.layer(place).parameters(recurse=False):
        p.grad = None


@action("between", "state", place=_PLACES)
def no_gradient_on_one_rank(run: Run, place: int) -> None:
    """Before a pass, which then gives all ranks the same again."""
    if run.rank == 1:
        for p in run.layer(place).parameters(recurse=False):
            p.grad = None
    run.one_pass()


@action(*_OFTEN, how=("norms", "clone", "numpy", "sum"))
def read_gradients(run: Run, how: str) -> None:
    found = [p.grad for p in run.parameters() if p.grad is not None]
    if how == "norms":
        run.outputs.append([g.norm() for g in found])
    elif how == "clone":
        run.outputs.append([g.clone() for g in found])
    elif how == "numpy":
        run.outputs.append([torch.from_numpy(g.numpy().copy()) for g in found])
    elif found:
        run.outputs.append(torch.stack([g.double().sum() for g in found]))


@action("gradient", how=("saved and put back", "moved to a list", "exchanged"))
def put_gradients_away(run: Run, how: str) -> None:
    """Another pass is made meanwhile, as for a second loss."""
    parameters = run.parameters()
    saved: list[Tensor | None] = [p.grad for p in parameters]
    if how == "saved and put back":
        saved = [None if g is None else g.clone() for g in saved]
        run.zero()
    else:
        saved = [None if g is None else g.clone() for g in saved]
        for p in parameters:
            p.grad = None
    run.one_pass(1)
    for p, g in zip(parameters, saved, strict=True):
        if how == "exchanged":
            p.grad = g
        elif g is not None:
            p.grad = g if p.grad is None else p.grad + g


@action("gradient")
def combine_gradients_again(run: Run) -> None:
    """A collective call of the user's, which changes nothing if they are combined by now."""
    for p in run.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


@action(*_OFTEN)
def sparse_gradient(run: Run) -> None:
    """Where the optimizer takes such."""
    p = next(p for p in run.parameters() if p.requires_grad)
    if p.grad is not None and (run.loop.optimizer, run.loop.groups) == ("sgd", "one"):
        p.grad = p.grad.to_sparse()


@action(
    "between", place=_PLACES,
    how=("tensor", "tensor reads", "accumulated", "accumulated reads", "module", "module input"),
)  # fmt: skip
def add_hook(run: Run, place: int, how: str) -> None:
    """A hook on a parameter's gradient, before or after it is accumulated, or on a module's."""
    removable = run.memory.setdefault("hooks", [])
    p = run.parameter(place)
    if how.startswith("module"):
        layer = run.layer(place)
        removable.append(
            layer.register_full_backward_hook(
                lambda module, given, out: run.outputs.append([g for g in out if g is not None])
            )
            if how == "module"
            else layer.register_forward_hook(
                lambda module, inputs, output: output * 0.5 if isinstance(output, Tensor) else None
            )
        )
    elif not p.requires_grad:
        return
    elif how == "tensor":
        removable.append(p.register_hook(lambda g: 0.5 * g))
    elif how == "tensor reads":
        removable.append(p.register_hook(lambda g: run.outputs.append(g.clone())))
    else:

        def after(p: Tensor) -> None:
            assert p.grad is not None
            if how == "accumulated":
                p.grad.mul_(0.5)
            else:
                run.outputs.append(p.grad.clone())

        removable.append(p.register_post_accumulate_grad_hook(after))


@action("between")
def remove_hooks(run: Run) -> None:
    for hook in run.memory.pop("hooks", []):
        hook.remove()


@action("between", before=(False, True))
def hook_steps(run: Run, before: bool) -> None:
    """The optimizer's own hooks."""

    def hook(optimizer: object, args: object, kwargs: object) -> None:
        if before:
            for p in run.parameters():
                if p.grad is not None:
                    p.grad.mul_(0.9)
        else:
            run.outputs.append([p.detach().clone() for p in run.parameters()])

    if before:
        run.optimizer.register_step_pre_hook(hook)
    else:
        run.optimizer.register_step_post_hook(hook)
