"""Which nets a solver trains and tests."""

from __future__ import annotations

from dataclasses import dataclass

from soonest.caffe.io.prototxt import read_net
from soonest.caffe.io.upgrade import net as upgraded
from soonest.caffe.proto.message import Message


@dataclass(frozen=True)
class Chosen:
    """A net of a solver.

    Attributes:
        definition: its ``NetParameter``.
        file: where it is from, for errors.
        state: what the solver says of level and stages.
    """

    definition: Message
    file: str
    state: Message | None


def training(solver: Message) -> Chosen:
    """The net to train.

    Raises:
        ValueError: there is none, or more than one.
    """
    names = ("net", "net_param", "train_net", "train_net_param")
    given = [name for name in names if solver.has(name)]
    if len(given) != 1:
        raise ValueError(
            f"the solver has {', '.join(given) or 'no net to train'}: give one of "
            f"{', '.join(names)}"
        )
    value = getattr(solver, given[0])
    return _chosen(value, solver.train_state if solver.has("train_state") else None)


def testing(solver: Message) -> list[Chosen]:
    """The nets to test, each with a number in ``test_iter``.

    Raises:
        ValueError: their numbers do not fit.
    """
    own = [*solver.test_net_param, *solver.test_net]
    count = len(solver.test_iter)
    general = solver.net_param if solver.has("net_param") else solver.net
    has_general = solver.has("net_param") or solver.has("net")
    if len(own) > count or (len(own) < count and not has_general):
        raise ValueError(
            f"the solver has {len(own)} nets to test and {count} test_iter: give one for each"
        )
    values = own + [general] * (count - len(own))
    states = list(solver.test_state)
    if states and len(states) != count:
        raise ValueError(f"the solver has {count} nets to test and {len(states)} test_state")
    if values and solver.test_interval < 1:
        raise ValueError("the solver has test_iter, so give a test_interval above 0, too")
    return [
        _chosen(value, states[number] if states else None) for number, value in enumerate(values)
    ]


def _chosen(value: Message | str, state: Message | None) -> Chosen:
    if isinstance(value, str):
        return Chosen(read_net(value), value, state)
    return Chosen(upgraded(value), "the solver's own net", state)
