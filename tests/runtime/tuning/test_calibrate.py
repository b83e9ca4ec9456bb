"""The measured network: what is measured, what is agreed on, what is remembered."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import soonest
from helpers.ranks import run_ranks
from soonest.core.cost import Network
from soonest.core.plan import METHODS
from soonest.runtime import comm
from soonest.runtime.comm import groups
from soonest.runtime.tuning import calibrate, op_times

CPU = torch.device("cpu")


def ranks_here() -> comm.Ranks:
    host = f"host {dist.get_rank() // 2}"
    return groups.ranks_of(groups.private_group(None, None), host)


def measures(methods: list[str], sizes: list[int]) -> tuple[dict[str, Any], list[int]]:
    seen: list[int] = []
    network = calibrate.measure(
        ranks_here(), methods=methods, device=CPU, sizes=sizes, watch=seen.append
    )
    return network.to_json(), seen


def test_every_rank_gets_the_same_costs_of_every_method() -> None:
    sizes = [1024, 8192, 65536]
    (first, seen), *others = run_ranks(measures, 4, list(METHODS), sizes)
    network = Network.from_json(first)
    assert network.methods == tuple(METHODS)
    assert all(cost.seconds[0] > 0 for cost in network.costs.values())
    assert all(set(cost.sizes_bytes) <= set(sizes) for cost in network.costs.values())
    assert seen[:2] == sizes[:2]
    assert [fit for fit, _ in others] == [first] * 3


def test_only_what_is_asked_for_is_measured_besides_all_reduce() -> None:
    fit, _ = run_ranks(measures, 2, ["exchange"], [1024, 8192])[0]
    assert set(fit) == {"all_reduce", "exchange"}


def hopeless() -> tuple[list[int], list[str]]:
    """A gather that takes ever more times as long as anything else."""
    timed: list[tuple[str, int]] = []

    def time(kind: str, ranks: Any, piece: Any, many: int) -> list[float]:
        timed.append((kind, piece.gradients.nbytes))
        kilobytes = piece.gradients.nbytes / (32 << 10)
        times = {"all_reduce": 0.5 + kilobytes, "all_gather": kilobytes**2, "exchange": kilobytes}
        return [times[kind]] * many

    calibrate.times_of = time
    sizes = [32 << 10, 64 << 10, 128 << 10, 256 << 10]
    network = calibrate.measure(
        ranks_here(), methods=["gather", "exchange"], device=CPU, sizes=sizes, budget_s=1e3
    )
    measured = [size for kind, size in timed if kind == "all_gather"]
    methods = ("gather", "exchange", "allreduce")
    return sorted(set(measured)), [
        network.best(size, methods) for size in (1 << 14, 1 << 17, 1 << 25)
    ]


def test_what_gets_ever_dearer_is_given_up() -> None:
    for measured, chosen in run_ranks(hopeless, 2):
        assert measured == [32 << 10, 64 << 10], "by now twice as dear as the exchange"
        assert chosen == ["gather", "exchange", "exchange"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_device_makes_first_is_no_cost(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, made = 0.0, set[str]()

    def run(kind: str, ranks: Any, piece: Any) -> None:
        nonlocal now_s
        now_s += 1e-3 if kind in made else 5.0
        made.add(kind)

    piece = calibrate.piece_of(1024, CPU, comm.EXACT)
    monkeypatch.setattr(calibrate, "time", SimpleNamespace(perf_counter=lambda: now_s))
    monkeypatch.setattr(op_times, "now_s", lambda piece: now_s)
    monkeypatch.setattr(calibrate, "piece_of", lambda *_: piece)
    monkeypatch.setattr(calibrate, "stream_of", lambda *_: op_times.Stream(6, 6e-3))
    monkeypatch.setattr(comm, "run", run)
    monkeypatch.setattr(comm, "first_rank_object", lambda group, mine: mine)
    seen: list[int] = []
    noop: Any = SimpleNamespace(group=None)
    calibrate.measure(noop, methods=["exchange"], device=torch.device(device), watch=seen.append)
    assert (seen == list(calibrate.SIZES)) == (device != "cpu")


def remembers(folder: str, change: float | None, damage: str | None = None) -> int:
    """How often the network is measured if the calibration left is off by a factor."""
    os.environ["SOONEST_CACHE"] = folder
    measure, measured = calibrate.measure, 0

    def counted(*args: Any, **options: Any) -> Network:
        nonlocal measured
        measured += 1
        return measure(*args, **options, sizes=[1024, 8192, 65536])

    calibrate.measure = counted
    ranks = ranks_here()
    for _ in range(2):
        calibrate.network_of(ranks, methods=["exchange"], device=CPU, wire=comm.EXACT)
        dist.barrier()
        for file in Path(folder).glob("*.json") if dist.get_rank() == 0 else ():
            if change is not None:
                costs = json.loads(file.read_text())
                for cost in costs.values():
                    cost["seconds"] = [change * seconds for seconds in cost["seconds"]]
                file.write_text(json.dumps(costs))
            if damage is not None:
                file.write_text(damage)
        dist.barrier()
    return measured


def test_a_calibration_is_remembered(tmp_path: Path) -> None:
    # Whatever else this machine does, times do not differ by so much.
    calibrate_twice = run_ranks(remembers, 2, str(tmp_path), None, calibrated=True)
    assert calibrate_twice[0] == calibrate_twice[1] >= 1
    (file,) = tmp_path.glob("*.json")
    assert Network.from_json(json.loads(file.read_text())).methods == ("allreduce", "exchange")


def test_a_calibration_of_another_network_is_not_used(tmp_path: Path) -> None:
    assert run_ranks(remembers, 2, str(tmp_path), 1e3, calibrated=True) == [2, 2]


_COST = {"sizes_bytes": [1024], "seconds": [1e-3]}


@pytest.mark.parametrize(
    "damage",
    ["{", "[]", json.dumps({"all_reduce": _COST}), json.dumps({"exchange": _COST})],
    ids=["cut off", "nothing", "without an op", "without the usual one"],
)
def test_a_damaged_calibration_is_measured_anew(damage: str, tmp_path: Path) -> None:
    assert run_ranks(remembers, 2, str(tmp_path), None, damage, calibrated=True) == [2, 2]


@pytest.mark.parametrize("folder", ["", "/proc/nowhere"])
def test_without_a_place_for_it_nothing_is_remembered(folder: str) -> None:
    assert run_ranks(remembers, 2, folder, None, calibrated=True) == [2, 2]


def trains(method: str | None) -> tuple[str, list[str], list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = soonest.prioritize(model, optimizer, method=method)
    for step in range(8):
        optimizer.zero_grad()
        model(torch.full((2, 40), 0.1 * (step + dist.get_rank()))).square().sum().backward()
        optimizer.step()
    handle.flush()
    assert handle.plan
    report = handle.report()
    assert report
    assert len(report.rows) == len(handle.plan.buckets)
    assert any(row.measured_s for row in report.rows)
    assert method is None or report.rows[0].why == f"method={method!r} was asked for"
    assert "shard_optimizer=True would leave" in str(report)
    return (
        handle.plan.fingerprint,
        sorted({bucket.method for bucket in handle.plan.buckets}),
        [float(p.double().sum()) for p in model.parameters()],
    )


@pytest.mark.parametrize("method", [None, "gather", "split"])
def test_training_on_a_measured_network(method: str | None) -> None:
    first, *others = run_ranks(trains, 3, method, calibrated=True)
    assert others == [first] * 2
    assert method is None or first[1] == [method]


def explains_given_plan() -> tuple[list[str], list[str]]:
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = soonest.prioritize(model, optimizer, method="split")
    assert handle.plan
    plan = handle.plan.to_json()
    handle.detach()
    handle = soonest.prioritize(model, optimizer, plan=soonest.Plan.from_json(plan))
    for _ in range(3):
        model(torch.ones(2, 40)).sum().backward()
        optimizer.step()
    report = handle.report()
    assert report
    assert all(row.predicted_s > 0 for row in report.rows)
    return [row.method for row in report.rows], [row.why for row in report.rows]


def test_a_given_plan_is_explained_by_what_its_own_methods_cost() -> None:
    for methods, why in run_ranks(explains_given_plan, 2, calibrated=True):
        assert set(methods) == {"split"}
        assert set(why) == {"as the given plan says"}
