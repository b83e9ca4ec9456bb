"""What ``prioritize`` does to a training run besides its numbers."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import soonest
from helpers.ranks import run_ranks
from helpers.steering import keep_to_the_usual_plan
from soonest.cli import main
from soonest.core.plan import Plan
from soonest.core.trace import Trace
from soonest.runtime.guard import pending


class Net(nn.Module):
    """Registered in another order than used; it has a buffer and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(32, 4)
        self.first = nn.Linear(8, 600)
        self.norm = nn.BatchNorm1d(600)
        self.middle = nn.Linear(600, 32)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(torch.relu(self.norm(self.first(x))))) * self.frozen


def build(seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    for _ in range(count):
        loss = model(torch.randn(6, 8)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def starts() -> dict[str, torch.Tensor]:
    model, optimizer = build(seed=dist.get_rank())
    model.norm.running_mean += dist.get_rank()  # type: ignore[operator]
    model.frozen.data += dist.get_rank()
    soonest.prioritize(model, optimizer)
    return values(model)


def test_every_rank_starts_from_the_first_one() -> None:
    first, *others = run_ranks(starts, 3)
    torch.manual_seed(0)
    assert same(first, values(Net()))
    assert all(same(first, other) for other in others)


def trains_in_a_part() -> tuple[int, dict[str, torch.Tensor]]:
    """Two of three ranks train; the third knows nothing of it."""
    members = [0, 2]
    if dist.get_rank() not in members:
        return 0, {}
    part = dist.new_group(members, use_local_synchronization=True)
    model, optimizer = build(seed=dist.get_rank())
    handle = soonest.prioritize(model, optimizer, process_group=part)
    steps(model, optimizer, 3)
    assert handle.plan
    return handle.plan.ranks, {name: p.clone() for name, p in model.named_parameters()}


def test_a_part_of_the_ranks_may_train_by_itself() -> None:
    first, idle, other = run_ranks(trains_in_a_part, 3)
    assert (first[0], idle[0], other[0]) == (2, 0, 2)
    assert same(first[1], other[1])


def learns() -> dict[str, Any]:
    model, optimizer = build()
    handle = soonest.prioritize(model, optimizer)
    keys, kind, first = list(model.state_dict()), type(model), handle.plan
    no_timeline = handle.timeline()
    steps(model, optimizer, 9)
    assert handle.plan is not None
    timeline = handle.timeline()
    assert timeline is not None
    return {
        "unchanged": keys == list(model.state_dict()) and type(model) is kind,
        "isinstance": isinstance(optimizer, torch.optim.AdamW),
        "before": no_timeline,
        "first": first.to_json() if first else None,
        "plan": handle.plan.to_json(),
        "timeline": timeline.to_json(),
    }


def test_the_first_step_shows_the_order_of_use() -> None:
    ranks = run_ranks(learns, 3)
    for rank in ranks:
        assert rank["unchanged"]
        assert rank["isinstance"]
        assert rank["before"] is None
        first, plan = Plan.from_json(rank["first"]), Plan.from_json(rank["plan"])
        assert next(slot.layer for slot in first.flats[0].slots) == "last"
        order = list(dict.fromkeys(slot.layer for slot in plan.flats[0].slots))
        assert order == ["first", "norm", "middle", "last"]
        assert len(plan.buckets) > 1
    assert ranks[0]["plan"] == ranks[1]["plan"] == ranks[2]["plan"]


def test_the_timeline_is_that_of_one_whole_step() -> None:
    for rank in run_ranks(learns, 3):
        timeline = soonest.Timeline.from_json(rank["timeline"])
        plan = Plan.from_json(rank["plan"])
        layers = {"first", "norm", "middle", "last"}
        assert {span.name for span in timeline.of("forward")} == layers
        assert {span.name for span in timeline.of("backward")} == layers
        assert next(span.name for span in timeline.of("forward")) == "first"
        assert len(timeline.of("send")) == len(plan.ops)
        assert timeline.of("update")
        assert all(0 <= span.start_s <= timeline.step_s for span in timeline.of("send"))


def settles() -> tuple[int, int]:
    """How many ops the last timeline shows, and how many the plan has."""
    model, optimizer = build()
    handle = soonest.prioritize(model, optimizer)
    while not handle.settled:
        steps(model, optimizer, 1)
    steps(model, optimizer, 3)
    timeline = handle.timeline()
    assert timeline is not None
    assert handle.plan is not None
    return len(timeline.of("send")), len(handle.plan.ops)


def test_the_timeline_is_that_of_the_plan_that_stays() -> None:
    for shown, planned in run_ranks(settles, 2):
        assert shown == planned


def hooked() -> list[int]:
    """How many layers have hooks: before prioritize, in flight, landed, in flight, detached."""
    model, optimizer = build()

    def now() -> int:
        return sum(bool(module._forward_pre_hooks) for module in model.children())

    found = [now()]
    keep_to_the_usual_plan()
    handle = soonest.prioritize(model, optimizer)
    while not handle.settled:
        steps(model, optimizer, 1)
    handle._engine.profiler.attention.closely = lambda: False  # type: ignore[union-attr, method-assign]
    for _ in range(2):
        steps(model, optimizer, 1)
        found.append(now())
        model.eval()(torch.ones(2, 8))
        found.append(now())
        model.train()
    handle.detach()
    return [*found, now()]


def test_modules_have_hooks_only_while_parameters_are_in_flight() -> None:
    for before, first, landed, second, again, after in run_ranks(hooked, 2):
        assert before == after == landed == again == 0
        assert first == second == 4


MODES: dict[str, Any] = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a dispatch mode": lambda: FlopCounterMode(display=False),
    "a default device": lambda: torch.device("cpu"),
}


def reads_in(mode: str) -> bool:
    """Whether reading in a mode right after a step changes nothing; updates may run right then."""
    runs: list[dict[str, torch.Tensor]] = []
    for read_in_mode in (True, False):
        model, optimizer = build()
        handle = soonest.prioritize(model, optimizer)
        for _ in range(4):
            steps(model, optimizer, 1)
            if not read_in_mode:
                handle.flush()
            with MODES[mode]():
                model.eval()(torch.ones(2, 8))
            model.train()
        handle.flush()
        runs.append(values(model))
    return same(*runs)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_in_which_a_parameter_is_read_does_not_change_its_update(mode: str) -> None:
    assert all(run_ranks(reads_in, 2, mode))


def detaches() -> dict[str, Any]:
    model, optimizer = build()
    cls = type(optimizer)
    before = dict(model.named_parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    handle = soonest.prioritize(model, optimizer)
    steps(model, optimizer, 8)
    scheduler.step()
    handle.detach()
    handle.detach()
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    step_is_plain = optimizer.step.__wrapped__ is cls.step  # type: ignore[attr-defined]
    shared = values(model)
    torch.manual_seed(dist.get_rank())
    steps(model, optimizer, 2)
    return {
        "objects": all(p is before[name] for name, p in model.named_parameters()),
        "plain": type(optimizer) is cls
        and step_is_plain
        and not any(pending.is_pending(p) for p in model.parameters())
        and not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules()),
        "own memory": len(storages) == len(before),
        "shared": shared,
        "alone": values(model),
    }


def test_detach_leaves_plain_objects() -> None:
    one, other = run_ranks(detaches, 2)
    for rank in (one, other):
        assert rank["objects"]
        assert rank["plain"]
        assert rank["own memory"]
    trained = [key for key in one["shared"] if "running" not in key]
    assert all(torch.equal(one["shared"][key], other["shared"][key]) for key in trained)
    assert not torch.equal(one["alone"]["last.weight"], other["alone"]["last.weight"])


def hooks() -> list[int]:
    model, optimizer = build()
    count = [0, 0, 0]

    def before(*_: Any) -> None:
        count[0] += 1

    def after(*_: Any) -> None:
        count[1] += 1

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    soonest.prioritize(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(7):
            steps(model, optimizer)
            scheduler.step()
    count[2] = len(caught)
    return count


def test_step_hooks_run_once_per_step_and_schedulers_do_not_warn() -> None:
    assert run_ranks(hooks, 2) == [[7, 7, 0]] * 2


def copies() -> list[bool]:
    model, optimizer = build()
    soonest.prioritize(model, optimizer)
    steps(model, optimizer, 7)
    model_copy, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    optimizer_copy = pickle.loads(pickle.dumps(optimizer))
    for twin in (model_copy, pickled):
        twin(torch.ones(2, 8)).sum().backward()
    steps(model, optimizer)
    return [
        type(optimizer_copy) is torch.optim.AdamW,
        len(optimizer_copy.state) == len(optimizer.state),
        not same(values(model), values(model_copy)),
        all(p.grad is not None for p in pickled.parameters() if p.requires_grad),
    ]


def test_copies_of_model_and_optimizer_are_plain() -> None:
    assert run_ranks(copies, 2) == [[True] * 4] * 2


def resumes(prioritized: bool) -> Any:
    model, optimizer = build()
    handle = soonest.prioritize(model, optimizer) if prioritized else None
    torch.manual_seed(1)
    steps(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 3)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    torch.manual_seed(2)
    steps(model, optimizer, 3)
    state = values(model)
    if handle is not None:
        handle.detach()
    return state


def test_loading_a_checkpoint_in_the_middle_of_overlap() -> None:
    """On equal data every rank computes what one rank computes alone."""
    torch.set_num_threads(1)
    alone = run_ranks(resumes, 1, False)[0]
    for rank in run_ranks(resumes, 2, True):
        assert same(rank, alone)


def unchanged_by_forward_order() -> bool:
    model, optimizer = build()
    soonest.prioritize(model, optimizer)
    model.eval()
    with torch.no_grad():
        model(torch.ones(2, 8))  # an evaluation before training
    model.train()
    steps(model, optimizer, 7)
    return True


def test_evaluation_before_the_first_step() -> None:
    assert run_ranks(unchanged_by_forward_order, 2) == [True, True]


SCRIPT = """
import atexit, os, sys, warnings
import torch, torch._dynamo, torch.distributed as dist
import soonest

# Torch is imported once for all. Whoever leaves this loop is a rank, and ends as a script does.
for how in sys.argv[2:]:
    rank = os.fork()
    if not rank:
        break
    code = os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])
    with open(f"{sys.argv[1]}/{how}.code", "a") as file:
        print(code, file=file)
else:
    sys.exit()

rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
for number, name in (1, "out"), (2, "err"):
    os.dup2(os.open(f"{sys.argv[1]}/{how}.{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
torchruns = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
dist.init_process_group("gloo", store=dist.PrefixStore(how, torchruns), rank=rank, world_size=ranks)
warnings.simplefilter("error")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 4000), torch.nn.Linear(4000, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
handle = soonest.prioritize(model, optimizer)
for _ in range(7):
    optimizer.zero_grad()
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()

def show():
    print(f"sum {sum(p.sum().item() for p in model.parameters()):.9e}", flush=True)

if how == "read":
    show()
if how == "rank 0 reads" and dist.get_rank() == 0:
    print(len(model.state_dict()), flush=True)
if how == "destroy":
    dist.destroy_process_group()
    show()
if how == "backward":
    model(torch.randn(4, 64)).sum().backward()
if how in ("exit", "raise"):
    atexit.register(show)
if how == "exit":
    sys.exit(3)
if how == "raise":
    raise KeyError("boom")
if how == "destroy at exit":
    atexit.register(dist.destroy_process_group)
if how == "detach":
    handle.detach()
    show()
"""
ENDS = {
    "nothing": 0, "read": 0, "rank 0 reads": 0, "destroy": 0, "backward": 0, "exit": 3, "raise": 1,
    "destroy at exit": 0, "detach": 0,
}  # fmt: skip
"""Ways for a script to end, with the exit code of each."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What scripts that ended in each of these ways have left: exit codes, output, errors."""
    folder = tmp_path_factory.mktemp("ended")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(folder), *ENDS],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SOONEST_CACHE": str(folder)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return folder


@pytest.mark.parametrize("how", ENDS)
def test_a_script_may_end_in_the_middle_of_overlap(how: str, ended: Path) -> None:
    def left(what: str) -> str:
        return "".join((ended / f"{how}.{name}").read_text() for name in what.split())

    codes, out, err = left("code"), left("0.out 1.out"), left("0.err 1.err")
    assert codes == f"{ENDS[how]}\n" * 2, err
    assert err.count("Traceback") == err.count("KeyError: 'boom'") == 2 * (how == "raise"), err
    assert "Warning" not in err, err
    assert how == "raise" or not err
    lines = out.splitlines()
    sums = [line for line in lines if line.startswith("sum")]
    assert len(sums) == 2 * (how in ("read", "destroy", "exit", "raise", "detach"))
    assert len(set(sums)) == len(sums) // 2
    assert (lines == ["4"]) == (how == "rank 0 reads")


def test_however_a_script_ends_its_last_update_is_applied(ended: Path) -> None:
    """What is shown after the end is what is shown before it."""
    shown = {
        line
        for how in ("read", "destroy", "exit", "raise", "detach")
        for rank in range(2)
        for line in (ended / f"{how}.{rank}.out").read_text().splitlines()
        if line.startswith("sum")
    }
    assert len(shown) == 1


def profiles(folder: str) -> str:
    keep_to_the_usual_plan()  # another might update in step(), which is not measured
    model, optimizer = build()
    handle = soonest.prioritize(model, optimizer)
    path = Path(folder, f"{dist.get_rank()}.json")
    with pytest.raises(ValueError, match="train some more steps"):
        handle.save_profile(path)
    while not handle.settled:
        steps(model, optimizer)
    steps(model, optimizer, 3)
    handle.save_profile(path)
    handle.detach()
    with pytest.raises(ValueError, match="before detach"):
        handle.save_profile(path)
    return str(path)


def test_a_profile_of_a_job_predicts_larger_ones(tmp_path: Path) -> None:
    first, _ = run_ranks(profiles, 2, str(tmp_path))
    trace = Trace.load(first)
    assert trace.model == "Net"
    assert {layer.name for layer in trace.layers} == {"first", "norm", "middle", "last"}
    assert trace.layers[0].name == "first", "in the order of use"
    sizes = {name: 4 * sum(p.numel() for p in m.parameters()) for name, m in Net().named_modules()}
    assert all(layer.bytes == sizes[layer.name] for layer in trace.layers)
    assert trace.forward_s > 0 < trace.backward_s
    assert trace.update_us > 0
    assert trace.info["ranks"] == 2
    figures = tmp_path / "figures.json"
    assert main(["predict", "--profile", first, "--hosts", "2,8", "--json", str(figures)]) == 0
    assert [row["hosts"] for row in json.loads(figures.read_text())["rows"]] == [2, 8]
