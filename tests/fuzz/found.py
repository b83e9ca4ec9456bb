"""Loops that once came out otherwise than under DDP, as short as they get."""

from __future__ import annotations

from typing import Any

from fuzz.loops import Line, Loop


def _line(name: str, **arguments: Any) -> Line:
    return Line(name, tuple(arguments.items()))


def _pass(*, by_rank: bool = False) -> Line:
    return _line("one_pass", task=0, by_rank=by_rank, autocast=False)


_STEP, _LOOK = _line("step", how="plain"), _line("look", first="kept")

FOUND = {
    "some gradients cleared between two passes": Loop(
        1, "mlp", "sgd", (_pass(), _line("zero", how="some"), _pass(), _STEP, _LOOK)
    ),
    "the state of a parameter of no dimensions put back": Loop(
        2,
        "mixed",
        "sgd, momentum",
        (_pass(), _STEP, _line("optimizer_state", how="as it is"), _pass(), _STEP, _LOOK),
    ),
    "averages put in, and evaluated in inference mode": Loop(
        3,
        "mlp",
        "sgd",
        (
            _line("try_averages", how="data swap", passes="eval"),
            _line("evaluate", mode="inference", count=1, alike=True),
            _pass(),
            _STEP,
            _LOOK,
        ),
    ),
    "one tensor for two gradients that a fused optimizer divides": Loop(
        4,
        "mlp",
        "sgd, fused",
        (_pass(), _line("change_gradients", place=1, how="alias"), _LOOK),
        settings=(("scaler", True),),
    ),
    "passes added to gradients that a fused optimizer has divided": Loop(
        5,
        "mlp",
        "adamw, fused",
        (_pass(), _STEP, _line("same_graph_twice", task=0), _STEP, _LOOK),
        settings=(("scaler", True),),
    ),
    "a gradient looked up that only another rank has used": Loop(
        6,
        "branches",
        "adam",
        (_pass(by_rank=True), _line("keep", place=3, what="gradient"), _STEP, _LOOK),
        settings=(("plan", "blocking"),),
    ),
    "a tensor of the optimizer's state kept, and read behind a step": Loop(
        8,
        "mlp",
        "sgd, momentum",
        (_pass(), _STEP, _line("keep", place=3, what="state"), _LOOK, _pass(), _STEP, _LOOK),
        settings=(("slow", True),),
    ),
    "a frozen parameter without elements": Loop(
        9, "mixed", "sgd, momentum", (_line("freeze", place=0, whole=True), _pass(), _STEP, _LOOK)
    ),
    "tensors of a frozen layer swapped": Loop(
        10,
        "mlp",
        "sgd",
        (_pass(), _STEP, _line("write", place=1, how="swap_tensors"), _pass(), _STEP, _LOOK),
        settings=(("frozen", True),),
    ),
    "an optimizer for what has been unfrozen": Loop(
        11,
        "mlp",
        "sgd",
        (
            _pass(),
            _line("unfreeze", place=1, all_of_it=True),
            _line("new_optimizer"),
            _pass(),
            _STEP,
            _LOOK,
        ),
        settings=(("frozen", True),),
    ),
    "a gradient kept on one rank, of a layer that no rank uses": Loop(
        12,
        "mlp",
        "sgd",
        (
            _pass(),
            _line("freeze", place=0, whole=True),
            _line("no_gradient_on_one_rank", place=0),
            _LOOK,
        ),
    ),
    "a gradient of the user's own that is still to be completed": Loop(
        13,
        "mlp",
        "sgd",
        (
            _line("freeze_for_a_step", place=0),
            _pass(),
            _line("own_gradients", of="one", keep=False, adds=True),
            _STEP,
            _pass(),
            _line("freeze_for_a_step", place=0),
            _LOOK,
        ),
        settings=(("plan", "blocking"),),
    ),
    "another optimizer between a backward pass and its step": Loop(
        7, "mlp", "sgd", (_pass(), _line("new_optimizer"), _line("step", how="kept"), _LOOK)
    ),
}
