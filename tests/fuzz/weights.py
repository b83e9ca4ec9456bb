"""Actions: weights are used, read, written, averaged, and given other memory."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from fuzz.loops import action
from fuzz.run import Run

_PLACES = tuple(range(6))


@action(
    "between",
    mode=("eval", "train", "eval with gradients", "inference"),
    count=(1, 2),
    alike=(True, False),
)
def evaluate(run: Run, mode: str, count: int, alike: bool) -> None:
    """Forward passes without a backward one, with the same inputs on all ranks or with others."""
    training = run.model.training
    run.freshen()
    run.arm.net.train(mode == "train")
    with_gradients = mode == "eval with gradients"
    with (
        torch.inference_mode() if mode == "inference" else torch.set_grad_enabled(with_gradients),
        run.averages_by_hand() if with_gradients else nullcontext(),
    ):
        for _ in range(count):
            x = run.inputs()
            out = run.forward(torch.linspace(-1, 1, x.numel()).view(x.shape) if alike else x)
            run.outputs.append(out.detach().clone())
    run.arm.net.train(training)


@action("between", of_net=(True, False))
def update_bn(run: Run, of_net: bool) -> None:
    """BatchNorm's statistics are taken anew, of the model or of a copy."""
    run.freshen()
    net = run.arm.net if of_net else copy.deepcopy(run.model)
    swa_utils.update_bn([run.inputs() for _ in range(2)], net)
    run.outputs.append([b.clone() for b in net.buffers()])


def _averages(run: Run, key: str) -> dict[str, Tensor]:
    """Of all parameters, as they first were; of one that has another shape by now, anew."""
    found: dict[str, Tensor] = run.memory.setdefault(key, {})
    for name, p in run.model.named_parameters():
        if name not in found or found[name].shape != p.shape or found[name].dtype != p.dtype:
            found[name] = p.detach().clone()
    return found


@action("between", how=("lerp", "data", "foreach", "averaged model", "state dict"))
def average(run: Run, how: str) -> None:
    """Averages of weights follow them."""
    if how == "averaged model":
        if run.memory.get("averaged of") is not run.layers()[-1]:
            run.memory["averaged of"] = run.layers()[-1]
            run.memory["averaged"] = swa_utils.AveragedModel(
                run.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
            )
        averaged = run.memory["averaged"]
        averaged.update_parameters(run.model)
        run.outputs.append([p.clone() for p in averaged.parameters()])
        return
    ema = _averages(run, "ema")
    now = dict(run.model.named_parameters())
    with torch.no_grad():
        if how == "foreach":
            torch._foreach_lerp_([ema[n] for n in now], [p.detach() for p in now.values()], 0.1)
            return
        state = run.model.state_dict()
        for name, p in now.items():
            if how == "lerp":
                ema[name].lerp_(p, 0.1)
            elif how == "data":
                ema[name] = 0.9 * ema[name] + 0.1 * p.data
            else:
                ema[name].lerp_(state[name], 0.1)


@action(
    "between",
    how=("data swap", "data kept", "copy", "load", "swap_tensors", "swap contents"),
    passes=("eval", "train", "none"),
)
def try_averages(run: Run, how: str, passes: str) -> None:
    """Averages are put into the model for an evaluation, and the weights put back."""
    ema, now = _averages(run, "ema"), dict(run.model.named_parameters())
    kept: dict[str, Any] = {}
    with torch.no_grad():
        for name, p in now.items():
            kept[name] = p.data if how.startswith("data") else p.detach().clone()
        if how == "load":
            kept = copy.deepcopy(run.model.state_dict())
            run.model.load_state_dict({**kept, **ema})
        for name, p in now.items():
            if how == "data swap":
                p.data, ema[name] = ema[name], p.data
            elif how == "data kept":
                p.data = ema[name]
            elif how == "copy":
                p.data.copy_(ema[name])
            elif how == "swap contents":
                other = p.data.clone()
                p.data.copy_(ema[name])
                ema[name].copy_(other)
            elif how == "swap_tensors":
                kept[name] = nn.Parameter(ema[name].clone(), p.requires_grad)
                torch.utils.swap_tensors(p, kept[name])
    if passes != "none":
        evaluate(run, passes, 1, True)
    with torch.no_grad():
        if how == "load":
            run.model.load_state_dict(kept)
        for name, p in now.items():
            if how == "data swap":
                p.data, ema[name] = ema[name], p.data
            elif how == "data kept":
                p.data = kept[name]
            elif how == "copy":
                p.data.copy_(kept[name])
            elif how == "swap contents":
                other = p.data.clone()
                p.data.copy_(ema[name])
                ema[name].copy_(other)
            elif how == "swap_tensors":
                torch.utils.swap_tensors(p, kept[name])


@action("between", how=("data =", "copy_", "exchange for good", "vector"))
def look_ahead(run: Run, how: str) -> None:
    """Training goes on from an average of weights now and then."""
    slow = _averages(run, "slow")
    if how == "vector":
        held = [slow[name] for name, _ in run.model.named_parameters()]
        if len({p.dtype for p in held}) == 1:
            mean = 0.5 * nn.utils.parameters_to_vector(run.parameters()).detach()
            mean += 0.5 * nn.utils.parameters_to_vector(held)
            nn.utils.vector_to_parameters(mean, run.parameters())
        return
    for name, p in run.model.named_parameters():
        slow[name] = slow[name] + 0.5 * (p.data - slow[name])
        if how == "data =":
            p.data = slow[name].clone()
        elif how == "exchange for good":
            p.data, slow[name] = slow[name], p.data
        else:
            p.data.copy_(slow[name])


@action(
    "between", place=_PLACES,
    how=(
        "data.mul_", "mul_", "copy_", "data =", "data = view", "set_", "clamp_", "apply", "init",
        "index", "numpy", "swap_tensors", "foreach", "load", "setattr data", "detach",
    ),
)  # fmt: skip
def write(run: Run, place: int, how: str) -> None:
    """A parameter is written to, or given other memory."""
    p = run.parameter(place)
    value = 0.9 * p.detach()
    with torch.no_grad():
        if how == "data.mul_":
            p.data.mul_(0.9)
        elif how == "mul_":
            p.mul_(0.9)
        elif how == "copy_":
            p.copy_(value)
        elif how == "data =":
            p.data = value
        elif how == "data = view":
            p.data = torch.cat([value.flatten(), value.flatten()])[p.numel() :].view(p.shape)
        elif how == "set_":
            p.set_(value)
            run.stale = True  # torch forgets DDP's hook
        elif how == "clamp_":
            p.clamp_(-0.2, 0.2)
        elif how == "apply":
            run.model.apply(lambda m: m.weight.data.mul_(0.9) if isinstance(m, nn.Linear) else None)
        elif how == "init":
            nn.init.constant_(p, 0.1)
        elif how == "index" and p.numel():
            p[..., 0] = 0.1
        elif how == "numpy":
            p.detach().numpy()[...] *= 0.9
        elif how == "swap_tensors":
            torch.utils.swap_tensors(p, nn.Parameter(value, p.requires_grad))
            run.stale = True
        elif how == "foreach":
            torch._foreach_mul_(run.parameters(), 0.9)
        elif how == "load":
            name = next(name for name, other in run.model.named_parameters() if other is p)
            run.model.load_state_dict({name: value}, strict=False)
        elif how == "setattr data":
            for q in run.parameters():
                q.data = q.data.clone()
        elif how == "detach":
            p.detach().mul_(0.9)


@action(
    "between",
    how=("share_memory", "channels_last", "double and back", "to", "half and back", "contiguous"),
)
def move(run: Run, how: str) -> None:
    """The model is given other memory as a whole."""
    if how == "share_memory":
        run.model.share_memory()
        run.kept.pop("numpy", None)  # torch itself frees the memory that it shows
    elif how == "channels_last":
        run.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    elif how == "to":
        run.model.to("cpu")
    elif how == "contiguous":
        for p in run.parameters():
            p.data = p.data.contiguous()
    elif run.loop.model != "recurrent" and len({p.dtype for p in run.parameters()}) == 1:
        run.model.to(torch.float64 if how == "double and back" else torch.bfloat16)
        run.model.float()
    run.stale = True  # DDP combines nothing, or something else, where a dtype or a stride changes
