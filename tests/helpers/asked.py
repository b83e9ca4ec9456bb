"""Which cases of a table are to be run, where one fixture runs them for all tests of a module."""

from __future__ import annotations

from typing import Any

import pytest


def asked_for(request: pytest.FixtureRequest, *names: str) -> list[Any]:
    """The cases of the tests that will run and use the fixture that asks, in their order.

    So a few cases of a large table take as long as these few.

    Args:
        request: of the fixture.
        names: of the parameters that say which case a test is of. The values of one, or tuples of
            several.
    """
    cases: list[Any] = []
    for item in request.session.items:
        assert isinstance(item, pytest.Function)
        ours = item.getparent(pytest.Module) is request.node
        if ours and request.fixturename in item.fixturenames:
            values = tuple(item.callspec.params[name] for name in names)
            cases.append(values[0] if len(names) == 1 else values)
    return list(dict.fromkeys(cases))
