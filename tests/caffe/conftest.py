from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# How long one example takes says nothing where many processes share a core.
settings.register_profile("caffe", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("caffe")


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """These nets are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
