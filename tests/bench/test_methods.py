"""What methods of reducing cost: what is measured, and what follows from it."""

import json
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import run_ranks
from soonest.bench import methods_rank, methods_show, session
from soonest.bench.methods import SIZES, Costs, Measuring, kept, repetitions
from soonest.bench.methods_rank import addend, measure
from soonest.bench.show import Screen
from soonest.cli import main
from soonest.core.plan import shards
from soonest.errors import SoonestError
from soonest.runtime import comm
from soonest.runtime.comm import groups

COSTS = Costs(
    4,
    1e8,
    {
        1024: {
            "allreduce": (0.04, 0.09, 0.01),
            "gather": (0.02,) * 3,
            "exchange": (0.01,) * 3,
            "shard": (0.001,) * 3,
        },
        4096: {
            "allreduce": (0.02,) * 3,
            "gather": (0.06,) * 3,
            "exchange": (0.08,) * 3,
            "shard": (0.01,) * 3,
        },
        16384: {"allreduce": (0.04,) * 3, "gather": (0.24,) * 3, "shard": (0.02,) * 3},
    },
    {1024: 0.1, 4096: 0.97, 16384: 0.2},
    12.3,
)


def shown(costs: Costs, capsys: pytest.CaptureFixture[str]) -> list[str]:
    screen = Screen()
    screen.show(methods_show.table(costs))
    for line in methods_show.remarks(costs):
        screen.say(line)
    return capsys.readouterr().out.splitlines()


# What follows from times


def test_the_cheapest_of_those_that_do_not_shard_is_chosen():
    chosen = [(c.size_bytes, c.method, c.over_allreduce) for c in COSTS.chosen()]
    assert chosen == [
        (1024, "exchange", pytest.approx(4.0)),
        (4096, "allreduce", 1.0),
        (16384, "allreduce", 1.0),
    ]


def test_the_choice_changes_where_the_lines_cross():
    (crossover,) = COSTS.crossovers()
    assert (crossover.before, crossover.after) == ("exchange", "allreduce")
    # Both leads are fourfold, so the lines cross in the middle of the logarithmic axis.
    assert crossover.size_bytes == 2048


def test_the_record():
    record = json.loads(json.dumps(COSTS.to_json()))
    assert (record["hosts"], record["link_bps"], record["wire"]) == (4, 1e8, "float32")
    assert record["sizes"] == [1024, 4096, 16384]
    row = record["rows"][0]
    assert row == {
        "size_bytes": 1024,
        "count": 256,
        "type": "float",
        "method": "allreduce",
        "time_s": 0.04,
        "times_s": [0.04, 0.09, 0.01],
        "algbw_bytes_per_s": pytest.approx(25600),
        "busbw_bytes_per_s": pytest.approx(25600 * 2 * 3 / 4),
    }
    assert len(record["rows"]) == 4 + 4 + 3
    assert record["chosen"][0]["method"] == "exchange"
    assert record["crossovers"] == [{"size_bytes": 2048, "from": "exchange", "to": "allreduce"}]
    assert record["seconds"] == 12.3


def test_a_method_is_given_up_when_it_is_hopeless():
    cost_s = {"allreduce": 9.0, "gather": 4.0, "exchange": 4.1, "split": 1.0}
    assert kept(list(cost_s), 64 << 10, cost_s) == list(cost_s)
    assert kept(list(cost_s), 256 << 10, cost_s) == ["allreduce", "gather", "split"]


def test_the_table_and_what_to_see_in_it(capsys: pytest.CaptureFixture[str]):
    lines = shown(COSTS, capsys)
    rows = {(words[0], words[3]): words[4:] for line in lines if len(words := line.split()) > 7}
    assert rows["1024", "exchange"] == ["10.00", "0.10", "0.15", "4.00", "cheapest"]
    assert rows["4096", "exchange"] == ["80.00", "0.05", "0.08", "0.25"]
    assert rows["16384", "exchange"] == ["-"] * 4
    table = [line for line in lines if not line[:1].isalpha()]
    assert max(map(len, table)) <= 80, "it fits into a terminal"
    said = "\n".join(lines)
    assert "Cheapest up to about 2 KiB: exchange, 4.00 times as fast as allreduce.\n" in said
    assert "Cheapest from about 2 KiB: allreduce, the backend's own.\n" in said
    assert "A dash: exchange took more than 4 times as long as the cheapest" in said
    assert "WARNING: The cores, not the links, may have limited this at 4 KiB:" in said


def test_one_method_that_is_always_the_cheapest(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    times_s = {1024: {"allreduce": (0.1,)}, 4096: {"allreduce": (0.2,)}}
    costs = Costs(2, 1e9, times_s, {1024: 0.0, 4096: 0.0}, 1.0)
    said = shown(costs, capsys)
    assert "Cheapest at every size: allreduce, the backend's own." in said
    assert not [line for line in said if line.startswith(("A dash", "WARNING"))]
    assert methods_show.draw(costs, tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_progress_gets_to_its_end_in_few_lines():
    progress = Measuring(1e8)
    assert progress.take({"kind": "warm"}) is False
    told = [{"kind": "repeated", "size_bytes": s} for s in SIZES for _ in range(repetitions(s))]
    worth = [progress.take(message) for message in told]
    assert worth[-1] is True
    assert progress.share == pytest.approx(1.0)
    assert len(SIZES) <= sum(worth) < 30
    assert progress.doing == "4 MiB by every method"


# What ranks measure


def measured(method_that_fails: str | None) -> dict[str, Any]:
    ranks = groups.ranks_of(groups.private_group(None, None))
    right = comm.reduce

    def reduce(method: str, ranks: comm.Ranks, tensor: torch.Tensor) -> None:
        right(method, ranks, tensor)
        if method == method_that_fails and ranks.group.rank() == 1:
            tensor[-1] += 1

    comm.reduce = reduce
    found = measure(ranks, ("allreduce", "exchange", "shard"), 4096, times=3)
    return {"times_s": found.times_s, "faults": found.faults}


def test_all_ranks_have_the_times_of_the_slowest():
    first, *others = run_ranks(measured, 3, None)
    assert list(first["times_s"]) == ["allreduce", "exchange", "shard"]
    assert all(len(times) == 3 and min(times) > 0 for times in first["times_s"].values())
    assert first["faults"] == []
    assert others == [first, first]


def test_a_wrong_sum_is_found_on_whatever_rank():
    for found in run_ranks(measured, 3, "exchange"):
        assert found["faults"] == ["4096 bytes reduced by exchange (on rank 1)"] * 3


def test_addends_differ_and_sum_up_exactly():
    addends = [addend(rank, 1000) for rank in range(64)]
    assert all(not torch.equal(one, other) for one, other in pairwise(addends))
    assert torch.equal(sum(addends), torch.stack(addends).flip(0).sum(0))


def told(from_call: int) -> list[dict[str, Any]]:
    """What a run tells if nothing is reduced any more from some call on."""
    ranks = groups.ranks_of(groups.private_group(None, None))
    right, calls, messages = comm.reduce, count(), list[dict[str, Any]]()

    def reduce(method: str, ranks: comm.Ranks, tensor: torch.Tensor) -> None:
        if next(calls) < from_call:
            right(method, ranks, tensor)

    comm.reduce = reduce
    methods_rank.tell = lambda kind, **content: messages.append({"kind": kind, **content})
    methods_rank.run(ranks)
    return messages


@pytest.mark.parametrize(
    ("from_call", "sizes"), [(0, []), (2 * 6, []), (2 * 6 + 9 * 6 + 1, [1024])]
)
def test_after_a_wrong_sum_nothing_more_is_measured(from_call: int, sizes: list[int]):
    first, second = run_ranks(told, 2, from_call)
    assert second == []
    assert [m["size_bytes"] for m in first if m["kind"] == "measured"] == sizes
    method = "gather" if sizes else "allreduce"
    size = 4096 if sizes else 1024
    assert first[-1] == {"kind": "wrong", "fault": f"{size} bytes reduced by {method} (on rank 0)"}


def test_wrong_sums_give_no_figures(monkeypatch: pytest.MonkeyPatch):
    def listen(lab: Any, command: Any, take: Any, say: Any) -> None:
        take(0, {"kind": "wrong", "fault": "4096 bytes reduced by split (on rank 1)"})

    class Nowhere:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(session, "_listen", listen)
    monkeypatch.setattr(session, "Lab", Nowhere)
    with pytest.raises(SoonestError, match="the sums are wrong: 4096 bytes reduced by split"):
        session.methods(2, 1e9, say=print, watch=print)


@pytest.mark.usefixtures("needs_lab")
def test_on_emulated_hosts(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    file, picture = tmp_path / "costs.json", tmp_path / "costs.png"
    asked = ["bench", "--methods", "--hosts", "2", "--json", str(file), "--picture", str(picture)]
    assert main(asked) == 0
    record = json.loads(file.read_text())
    assert (record["hosts"], record["link_bps"]) == (2, 1e9)
    assert record["sizes"] == list(SIZES)
    by_size = {size: [r for r in record["rows"] if r["size_bytes"] == size] for size in SIZES}
    for size, rows in by_size.items():
        assert {"allreduce"} <= {row["method"] for row in rows}
        assert "hierarchical" not in {row["method"] for row in rows}
        assert all(len(row["times_s"]) == repetitions(size) for row in rows)
    assert len(by_size[1024]) == 6
    for choice, size in zip(record["chosen"], SIZES, strict=True):
        assert choice["size_bytes"] == size
        assert choice["over_allreduce"] >= 1
        assert not shards(choice["method"])
    for crossover in record["crossovers"]:
        assert crossover["from"] != crossover["to"]
        assert SIZES[0] <= crossover["size_bytes"] <= SIZES[-1]
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capfd.readouterr()
    assert "100%  4 MiB by every method" in said.out, "progress in plain lines"
    assert "Reducing a tensor over 2 hosts, links of 1 Gbit/s" in said.out
    assert not said.err
