"""For all tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """What has been imported by now is not looked through again each time garbage is collected."""
    gc.collect()
    gc.freeze()
