import pytest

from soonest.lab import unavailable

WHY_NOT = unavailable()


@pytest.fixture
def needs_lab() -> None:
    if WHY_NOT is not None:
        pytest.skip(WHY_NOT)
