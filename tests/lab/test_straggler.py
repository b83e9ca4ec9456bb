"""A host with a slow link is named as such by the training that it slows down."""

from __future__ import annotations

import json
import sys

import pytest

from soonest.lab import Lab, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

HOSTS, LINK_BPS, SLOW = 3, 200e6, 1

TRAIN = """
import json, sys
import torch, torch.distributed as dist
from torch import nn
import soonest
from soonest.core.cost import Network
from soonest.runtime.tuning import calibrate, trials
trials.CANDIDATES = trials.CANDIDATES[:1]  # to search for plans takes long
calibrate.network_of = lambda ranks, **_: Network.ideal(3, 200e6)  # and so does to measure it
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
handle = soonest.prioritize(model, optimizer, method=sys.argv[1])
x = torch.randn(4, 256)
for step in range(40):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
handle.flush()
print(json.dumps({
    "name": handle.engine.failures.names[int(sys.argv[2])],
    "last": handle.report().notes[-1],
    "history": [line for line in handle.history if " late" in line],
}))
dist.barrier()
dist.destroy_process_group()
"""


def trained(method: str, *, slow: int | None) -> list[dict]:
    lines: list[tuple[int, str]] = []
    with Lab(HOSTS, LINK_BPS) as lab:
        if slow is not None:
            lab.set_link(slow, LINK_BPS / 3)
        code = lab.run(
            [sys.executable, "-c", TRAIN, method, str(SLOW)],
            env={"SOONEST_CACHE": ""},
            preload=True,
            on_line=lambda rank, line: lines.append((rank, line)),
            timeout_s=120,
        )
    assert code == 0, lines
    found = {rank: json.loads(line) for rank, line in lines if line.startswith("{")}
    return [found[rank] for rank in range(HOSTS)]


@pytest.mark.parametrize("method", ["allreduce", "gather"])
def test_a_slow_link_is_named(method: str) -> None:
    for found in trained(method, slow=SLOW):
        assert found["last"].startswith(f"{found['name']} is late since step "), found
        assert "its link carries" in found["last"]
        assert len(found["history"]) == 1, "and nobody else"


def test_equal_links_are_not_late() -> None:
    for found in trained("allreduce", slow=None):
        assert found["last"].startswith("no rank is late"), found
        assert found["history"] == []
