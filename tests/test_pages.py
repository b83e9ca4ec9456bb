"""The README is short, its commands run as written, and links in all pages lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from soonest.lab import unavailable

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"])
BEFORE = """\
import torch
from torch import nn
import soonest
torch.manual_seed(0)
model, criterion = nn.Linear(3, 2), nn.MSELoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(4)]
"""
"""What the loop in the README takes for granted."""
AFTER = """
soonest.prioritize  # it is there
total = sum(p.detach().double().sum() for p in model.parameters())
every = [None] * torch.distributed.get_world_size()
torch.distributed.all_gather_object(every, float(total))
assert len(every) > 1 and len(set(every)) == 1, every
print("trained")
torch.distributed.destroy_process_group()
"""


def loop() -> str:
    """The loop of the README, as it is once the line is added."""
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.S)
    kept = [line[2:] for line in diff.splitlines() if not line.startswith("-")]
    return BEFORE + "\n".join(kept) + AFTER


def command(start: str) -> list[str]:
    """The command of the README that begins so."""
    found = [c for c in re.findall(r"(?:^    |`)([^`\n]+)", README, re.M) if c.startswith(start)]
    assert len(found) == 1, found
    return shlex.split(found[0], comments=True)


def run(words: list[str], folder: Path, timeout_s: float = 120) -> subprocess.Popen[str]:
    scripts = Path(sys.executable).parent
    return subprocess.Popen(
        [str(scripts / words[0]) if (scripts / words[0]).exists() else words[0], *words[1:]],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "SOONEST_CACHE": "",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_loop_runs_on_two_nodes_as_the_readme_starts_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(loop())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        word.replace("first-node:29500", f"localhost:{port}")
        for word in command("torchrun --nnodes")
    ]
    nodes = [run(words, tmp_path) for _ in range(2)]
    told = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert all("trained" in one for one in told)


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_the_loop_runs_in_the_lab(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(loop())
    lab = run(command("soonest lab run"), tmp_path)
    told, _ = lab.communicate(timeout=200)
    assert lab.returncode == 0, told
    assert told.count("trained") == 4


@pytest.mark.parametrize("start", ["soonest --help", "soonest predict --trace"])
def test_a_command_of_the_readme_runs(start: str, tmp_path: Path) -> None:
    ran = run(command(start), tmp_path)
    told, _ = ran.communicate(timeout=200)
    assert ran.returncode == 0, told
    assert told.strip()


def anchors(page: Path) -> set[str]:
    """What can be linked to in a page, as GitHub names it."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    plain = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
    return {head.replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in found:
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        where, _, anchor = link.partition("#")
        target = (page.parent / where).resolve() if where else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link
