"""A lab of 64 hosts starts, trains and ends on a small machine."""

import sys

import pytest

from soonest.lab import Lab, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

HOSTS = 64

TRAIN = """
import torch, soonest
import torch.distributed as dist

dist.init_process_group()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
handle = soonest.prioritize(model, optimizer)
before = [parameter.clone() for parameter in model.parameters()]
torch.manual_seed(dist.get_rank())
for _ in range(3):
    loss = model(torch.randn(4, 8)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
handle.flush()
changed = not any(map(torch.equal, before, model.parameters()))
mine = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()])
every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
dist.all_gather(every, mine)
with open("/proc/self/smaps_rollup") as rollup:
    own_kb = sum(int(line.split()[1]) for line in rollup if line.startswith("Private"))
print(changed, all(torch.equal(mine, other) for other in every), len(every), own_kb // 1024)
handle.detach()
dist.destroy_process_group()
"""


def test_64_hosts_train_together_and_share_their_memory():
    said = {}
    with Lab(hosts=HOSTS, link_bps=1e9) as lab:
        code = lab.run(
            [sys.executable, "-c", TRAIN],
            on_line=lambda rank, line: said.setdefault(rank, []).append(line.split()),
            timeout_s=280,
        )
    assert code == 0, said
    assert sorted(said) == list(range(HOSTS))
    assert {tuple(words[:3]) for [words] in said.values()} == {("True", "True", str(HOSTS))}
    assert max(int(words[3]) for [words] in said.values()) < 60, "MB of its own, and 230 if alone"


def test_hosts_find_each_other_whatever_the_machine_has_room_for():
    # The limit is the kernel's, on addresses that hosts have learnt; 64 hosts would exceed it.
    lines = []
    with Lab(hosts=48, link_bps=1e9) as lab:
        script = "ip -o neigh | grep -c PERMANENT; ip -o neigh | grep -vc PERMANENT"
        lab.run(["sh", "-c", f"{script}; true"], on_line=lambda _, line: lines.append(line))
    assert sorted(lines) == ["0"] * 48 + ["47"] * 48
