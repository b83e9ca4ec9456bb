"""What passes of a drop-in class show, one after the other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from soonest.runtime.ddp.unused_parameters import UnusedParameterCheck


class Log:
    def __init__(self) -> None:
        self.errors: list[str] = []

    def set_error_and_log(self, error: str) -> None:
        self.errors.append(error)


def made(*, static: bool = False) -> tuple[UnusedParameterCheck, Log]:
    log: Any = Log()
    check = UnusedParameterCheck({"a": 0, "b": 1, "c": 2}, log)
    check.static = static
    return check, log


def ended(check: UnusedParameterCheck, *late: str) -> None:
    engine: Any = SimpleNamespace(backward=SimpleNamespace(synchronizing=True))
    params: Any = [SimpleNamespace(name=name) for name in late]
    check.ended(engine, params)
    assert engine.backward.synchronizing is False


def test_what_got_no_gradient_is_an_error_unless_it_may_be_so() -> None:
    check, log = made()
    ended(check)
    check.check(find_unused=False, rank=1)
    ended(check, "c", "a")
    assert check.missing == [0, 2]
    check.check(find_unused=True, rank=1)
    with pytest.raises(RuntimeError, match="did not receive grad for rank 1: 0 2"):
        check.check(find_unused=False, rank=1)
    assert len(log.errors) == 1


def test_in_a_static_graph_the_same_parameters_stay_unused() -> None:
    check, _ = made(static=True)
    for _ in range(2):
        ended(check, "b")
        check.check(find_unused=False, rank=0)
    assert check.alike


def test_a_static_graph_that_comes_to_use_more_is_an_error() -> None:
    check, log = made(static=True)
    ended(check, "b")
    with pytest.raises(RuntimeError, match="unused in first iteration, but then got used"):
        ended(check)
    assert len(log.errors) == 1
    with pytest.raises(RuntimeError, match="training graph has changed"):
        check.check(find_unused=False, rank=0)


def test_a_static_graph_that_comes_to_use_less_is_an_error() -> None:
    check, _ = made(static=True)
    ended(check, "b")
    ended(check, "b", "c")
    assert not check.alike
    with pytest.raises(RuntimeError, match="used in first iteration, but then got unused"):
        check.check(find_unused=False, rank=0)
