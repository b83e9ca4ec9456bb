"""Random training loops: a model, an optimizer, and what is done with them, line by line.

Everything follows from one number, so that a loop can be told by its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from fuzz import models, optimizers

Choices = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Action:
    """A kind of line.

    Args:
        moments: where it may stand: as the ``pass`` of a step, on its ``gradient``, ``between``.
        call: what it does, given a run and arguments.
        choices: for each argument, the values that it may have.
    """

    moments: tuple[str, ...]
    call: Callable[..., None]
    choices: Choices

    @property
    def touches_gradients(self) -> bool:
        """Whether it does something with gradients, or with states, at any time."""
        return "between" in self.moments and bool({"gradient", "zero", "state"} & {*self.moments})


ACTIONS: dict[str, Action] = {}


def action(*moments: str, **choices: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Makes a function an action, by its name."""

    def add(call: Callable[..., None]) -> Callable[..., None]:
        ACTIONS[call.__name__] = Action(moments, call, choices)
        return call

    return add


@dataclass(frozen=True)
class Line:
    """One action with its arguments."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.arguments)})"


@dataclass(frozen=True)
class Loop:
    """A training loop.

    Args:
        seed: of the data, and of what actions draw.
        model, optimizer, scheduler: by their names; a scheduler of None is none.
        groups: how the parameters are put into groups.
        settings: what else holds for all of it.
        lines: what is done.
    """

    seed: int
    model: str
    optimizer: str
    lines: tuple[Line, ...]
    groups: str = "one"
    scheduler: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def setting(self, name: str) -> Any:
        """One of the settings; the first of its choices, which is the plainest, if it has none."""
        return dict(self.settings).get(name, SETTINGS[name][0])

    @property
    def finds_unused(self) -> bool:
        """Whether DistributedDataParallel has to look for parameters that are not used."""
        needs_all = self.model in models.NEEDS_ALL_USED and not self.setting("frozen")
        return not needs_all and (
            self.model in models.LEAVES_SOME_UNUSED or self.setting("find_unused")
        )

    def __str__(self) -> str:
        settings = "".join(
            f", {key}={value!r}" for key, value in self.settings if value != SETTINGS[key][0]
        )
        head = (
            f"seed {self.seed}: {self.model}; {self.optimizer}; groups {self.groups}; "
            f"scheduler {self.scheduler}{settings}"
        )
        return "\n".join(
            [head, *(f"  {number:2d} {line}" for number, line in enumerate(self.lines))]
        )


SETTINGS: Choices = {
    "find_unused": (*(True,) * 5, False),
    "frozen": (False, False, False, True),  # the first layer, when the training starts
    "apart": (False, False, True),  # ranks begin with other values
    "scaler": (False,) * 7 + (True,),
    "around": ("", "", "", "", "lookahead"),  # stands around the optimizer
    "bucket_mb": (None, None, 0.0003),  # of DistributedDataParallel, and of what stands for it
    "early": (False, False, True),  # the scheduler and the kept step are made before wrapping
    "plan": ("turns", "turns", "given", "blocking", "one bucket"),
    "method": (None, None, None, "gather", "exchange", "split", "allreduce"),
    "separable": (None, None, None, True, False),
    "slow": (False, False, True),  # what is sent takes a while
}
"""What holds for all of a loop; the plainest first."""

PASSES = ("one_pass",) * 3
"""What a step has, beside the drawn ones."""
SECTIONS = ("kept", "parameters", "gradients", "buffers", "optimizer", "outputs")
"""What is read, in any order."""


def draw(seed: int, without: Collection[str] = ()) -> Loop:
    """The loop of a seed.

    Each has only some kinds of actions, so that each of these is often alone with another. Some do
    with gradients and states nothing but what goes where these are shared out over the ranks, too.

    Args:
        seed: any.
        without: names of actions that it must not have.
    """
    random = Random(seed)
    model, optimizer = (
        random.choice(list(models.MODELS)),
        random.choice(list(optimizers.OPTIMIZERS)),
    )
    settings = {name: random.choice(choices) for name, choices in SETTINGS.items()}
    if settings["scaler"] or optimizer in optimizers.CLOSURE_ONLY:
        settings["scaler"] = optimizer not in optimizers.CLOSURE_ONLY
        settings["around"] = ""
    keeps_to_steps = random.random() < 0.4
    of = {
        moment: [
            name
            for name, one in ACTIONS.items()
            if moment in one.moments
            and name not in without
            and not (keeps_to_steps and moment == "between" and one.touches_gradients)
        ]
        for moment in ("pass", "gradient", "between")
    }
    chosen = {
        "pass": [*PASSES, *random.sample(of["pass"], min(len(of["pass"]), random.randint(0, 2)))],
        "gradient": random.sample(of["gradient"], min(len(of["gradient"]), random.randint(0, 2))),
        "between": random.sample(of["between"], min(len(of["between"]), random.randint(1, 4))),
    }
    always_looks = random.random() < 0.5
    lines: list[Line] = []

    def add(moment: str, likely: float) -> None:
        while chosen[moment] and random.random() < likely:
            lines.append(draw_line(random, random.choice(chosen[moment])))
            likely /= 3

    steps = random.randint(3, 7)
    closure = optimizer in optimizers.CLOSURE_ONLY or random.random() < 0.1
    usual_zero = draw_line(random, "zero")
    if keeps_to_steps:
        usual_zero = Line("zero", (("how", random.choice(("none", "zero", "model"))),))
    zeroes_last = random.random() < 0.2
    for step in range(steps):
        add("between", 0.35)
        if not closure:
            if not zeroes_last and random.random() < 0.9:
                usual = keeps_to_steps or random.random() < 0.8
                lines.append(usual_zero if usual else draw_line(random, "zero"))
            add("between", 0.1)
            lines.append(draw_line(random, random.choice(chosen["pass"])))
            add("between", 0.1)
            add("gradient", 0.5)
        lines.append(Line("closure_step") if closure else draw_line(random, "step"))
        add("between", 0.35)
        if zeroes_last:
            lines.append(usual_zero)
        if always_looks or step == steps - 1 or random.random() < 0.25:
            lines.append(Line("look", (("first", random.choice(SECTIONS)),)))
    return Loop(
        seed=seed,
        model=model,
        optimizer=optimizer,
        lines=tuple(lines),
        groups=random.choice(("one", "one", "two", "size", "each")),
        scheduler=random.choice((None, None, None, *optimizers.SCHEDULERS)),
        settings=tuple(settings.items()),
    )


def draw_line(random: Random, name: str) -> Line:
    """An action with any arguments that it may have."""
    choices = ACTIONS[name].choices
    return Line(name, tuple((key, random.choice(values)) for key, values in choices.items()))


def simpler(loop: Loop) -> list[Loop]:
    """The same lines with one thing about it plainer, for each that there is."""
    found = [
        replace(loop, settings=tuple(pair for pair in loop.settings if pair[0] != name))
        for name, value in loop.settings
        if value != SETTINGS[name][0]
    ]
    if loop.scheduler is not None:
        found.append(replace(loop, scheduler=None))
    if loop.groups != "one":
        found.append(replace(loop, groups="one"))
    found += [
        replace(loop, optimizer=one) for one in _before(loop.optimizer, "sgd", "sgd, momentum")
    ]
    found += [replace(loop, model=one) for one in _before(loop.model, "mlp", "branches")]
    for place, line in enumerate(loop.lines):
        for index, (key, value) in enumerate(line.arguments):
            for plainer in _before(value, *ACTIONS[line.name].choices[key][:2]):
                arguments = list(line.arguments)
                arguments[index] = (key, plainer)
                lines = list(loop.lines)
                lines[place] = Line(line.name, tuple(arguments))
                found.append(replace(loop, lines=tuple(lines)))
    return found


def _before(value: Any, *plainer: Any) -> tuple[Any, ...]:
    return plainer[: plainer.index(value)] if value in plainer else plainer
