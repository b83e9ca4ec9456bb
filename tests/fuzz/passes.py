"""Actions: forward and backward passes, and steps."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fuzz.loops import action
from fuzz.models import FEATURES
from fuzz.optimizers import Lookahead
from fuzz.run import BATCH, Run

_TASK, _YES_NO = (0, 0, 1), (False, True)


@action("pass", task=_TASK, by_rank=(False, False, True), autocast=(False,) * 5 + (True,))
def one_pass(run: Run, task: int, by_rank: bool, autocast: bool) -> None:
    with run.autocast(autocast):
        loss = run.loss(run.task(task, by_rank))
    run.backward(loss)


@action("pass", count=(2, 3), task=_TASK, by_rank=_YES_NO)
def accumulate(run: Run, count: int, task: int, by_rank: bool) -> None:
    """All passes but the last one are not combined."""
    for _ in range(count - 1):
        with run.no_sync():
            run.one_pass(run.task(task, by_rank))
    run.one_pass(task)


@action("pass", count=(2, 3), by_rank=_YES_NO)
def passes_in_a_row(run: Run, count: int, by_rank: bool) -> None:
    for task in range(count):
        run.one_pass(run.task(task % 2, by_rank))


@action("pass", count=(2, 3), by_rank=_YES_NO)
def one_backward_for_several(run: Run, count: int, by_rank: bool) -> None:
    losses = [run.loss(run.task(i % 2, by_rank)) for i in range(count)]
    run.backward(torch.stack(losses).mean())


@action("pass", task=_TASK)
def same_graph_twice(run: Run, task: int) -> None:
    with run.averages_by_hand() as backward:
        loss = run.loss(task)
        backward(loss, retain_graph=True)
        backward(0.5 * loss)


@action("pass", first_first=_YES_NO)
def forwards_then_backwards(run: Run, first_first: bool) -> None:
    with run.averages_by_hand() as backward:
        losses = [run.loss(task) for task in (0, 1)]
        for loss in losses if first_first else losses[::-1]:
            backward(loss)


@action("pass", projected=_YES_NO, into=("sum", "copies"))
def gradients_of_tasks(run: Run, projected: bool, into: str) -> None:
    """The gradients of two tasks are put together by hand, as PCGrad and others do."""
    kept: list[list[Tensor | None]] = []
    for task in (0, 1):
        run.zero()
        run.one_pass(task)
        kept.append([None if p.grad is None else p.grad.clone() for p in run.parameters()])
    if into == "sum":
        run.zero()
    for p, *found in zip(run.parameters(), *kept, strict=True):
        gradients = [g for g in found if g is not None]
        if not gradients:
            continue
        if projected and len(gradients) == 2:
            one, other = gradients
            along = (one * other).sum()
            if along < 0:
                gradients[0] = one - along * other / other.square().sum()
        if into == "sum" or p.grad is None:
            p.grad = torch.stack(gradients).sum(0)
        else:
            p.grad.copy_(torch.stack(gradients).sum(0))


@action("pass", task=_TASK)
def penalty(run: Run, task: int) -> None:
    """The gradient by the inputs is part of the loss."""
    x = run.inputs().requires_grad_()
    loss = run.loss(task, x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True, allow_unused=True)
    run.backward(loss if gradient is None else loss + gradient.square().sum())


@action("pass", task=_TASK, of=("parameters", "first"))
def gradients_apart(run: Run, task: int, of: str) -> None:
    """``torch.autograd.grad`` goes through the graph before ``backward`` does."""
    loss = run.loss(task)
    wanted = [p for p in run.parameters() if p.requires_grad][: None if of == "parameters" else 1]
    found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    run.outputs.append([g for g in found if g is not None])
    run.backward(loss)


@action("pass", by=("data", "add"))
def sharpness_aware(run: Run, by: str) -> None:
    """A second pass, at weights that the first one's gradients lead to."""
    run.one_pass()
    moved: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for p in run.parameters():
            if p.grad is not None:
                way = 0.05 * p.grad
                if by == "add":
                    p.add_(way)
                else:
                    p.data = p.data + way
                moved.append((p, way))
    run.zero()
    run.one_pass()
    with torch.no_grad():
        for p, way in moved:
            p.sub_(way)


@action("pass", by=("zero_grad", "none", "zero"))
def thrown_away(run: Run, by: str) -> None:
    """The gradients of one pass are thrown away, and another one made."""
    run.one_pass()
    for p in run.parameters():
        if by == "none":
            p.grad = None
        elif by == "zero" and p.grad is not None:
            p.grad.zero_()
    if by == "zero_grad":
        run.zero()
    run.one_pass()


@action("pass", "between")
def forward_without_backward(run: Run) -> None:
    """With gradients wanted, but nobody asks for them."""
    with run.averages_by_hand():  # DDP would combine the next pass even within no_sync
        run.outputs.append(run.forward(run.inputs()).detach())


@action("pass", steps=(1, 2))
def on_its_own(run: Run, steps: int) -> None:
    """Ranks step by themselves for a while, and then average their weights."""
    for _ in range(steps):
        run.zero()
        with run.no_sync():
            run.one_pass()
        run.step()
    for p in run.parameters():
        dist.all_reduce(p.data)
        p.data /= dist.get_world_size()
    run.optimizer.state.clear()  # it is not the same on all ranks any more
    if isinstance(run.stepper, Lookahead):
        run.stepper.slow.clear()
    run.zero()
    run.one_pass()


@action("pass", scale=(0.0, 0.5))
def part_of_a_batch(run: Run, scale: float) -> None:
    """Some of the outputs have no part in the loss."""
    out = run.forward(run.inputs(), 0)
    run.backward(out[: BATCH // 2].square().mean() + scale * out.sum())


@action("pass")
def inputs_with_gradients(run: Run) -> None:
    """What comes before the model is trained by hand."""
    scale = torch.ones(FEATURES, requires_grad=True)
    run.backward(run.loss(0, run.inputs() * scale))
    run.outputs.append(scale.grad)  # None where the inputs are only looked up


@action("step", "between", how=("plain", "plain", "plain", "kept", "by class"))
def step(run: Run, how: str) -> None:
    run.step(how)


def closure_step(run: Run) -> None:
    run.freshen()
    run.outputs.append(run.stepper.step(run.closure).detach())
    if run.scheduler is not None:
        run.scheduler.step()


action("closure")(closure_step)
