"""The standing table: what it runs, that it resumes, and its page."""

import json
from pathlib import Path
from typing import Any

import pytest

from soonest.bench import page, suite
from soonest.bench.result import Result
from soonest.bench.scale import Capacity
from soonest.bench.settings import Settings
from soonest.cli import main
from soonest.errors import SoonestError

TWO = suite.cases(("alexnet",), (2, 4), (1.0,))


def result_of(settings: Settings, name: str, *, soonest_over_bound: float = 1.02) -> Result:
    bound_ms = settings.bound_s * 1e3
    times = {"local": 0.99, "ddp-tuned": 1.4, "fsdp2": 1.3, "soonest": soonest_over_bound}
    arms = {
        arm: {"step_ms": over * bound_ms, "load": 0.1, "compute_error": 0.0, "step_ms_all": []}
        for arm, over in times.items()
    }
    return Result(
        {
            "trace": name,
            "hosts": settings.hosts,
            "link_bps": settings.link_bps,
            "shaped_link_bps": settings.shaped_bps,
            "slow_motion": settings.slow_motion,
            "shrink": settings.shrink,
            "compute_ms": 28.8,
            "communication_ms": settings.communication_s * 1e3,
            "bound_ms": bound_ms,
            "machine": {"cores": 2},
            "absent": {"horovod": "horovod is not installed"},
            "arms": arms,
            "timelines": {"soonest": {"title": "soonest", "step_s": 1.0, "spans": []}},
        }
    )


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Stands in for the ranks; remembers what was run."""
    seen: list[Settings] = []

    def run(settings: Settings, *, name: str, **_: Any) -> Result:
        seen.append(settings)
        return result_of(settings, name)

    monkeypatch.setattr(suite.session, "run", run)
    monkeypatch.setattr(suite.session, "probe", lambda hosts, say: Capacity(1e-4, 5e-3, 2e8))
    monkeypatch.setattr("soonest.lab.unavailable", lambda: None)
    return seen


def nothing(_: object) -> None:
    pass


def test_the_standing_table():
    every = suite.cases()
    assert len(every) == len({case.file(Path()) for case in every}) == 4 * 3 * 3


def test_it_writes_records_and_the_page(
    ran: list[Settings], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    asked = ["bench", "--suite", "--trace", "alexnet", "--hosts", "4", "--out", str(tmp_path)]
    assert main(asked) == 0
    assert [settings.hosts for settings in ran] == [4, 4, 4]
    for settings, load in zip(ran, suite.LOADS, strict=True):
        compute_s = settings.trace.forward_s + settings.trace.backward_s
        assert settings.communication_s == pytest.approx(load * compute_s)
    records = sorted(file.name for file in (tmp_path / "records").glob("*.json"))
    assert records == [f"alexnet-4-hosts-{load}x.json" for load in ("0.5", "1", "2")]
    text = (tmp_path / "README.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| alexnet | 1 ×")]
    assert "| 1.020 |" in row
    assert row.endswith("| fsdp2 | 1.275 |")
    assert "![Step times on 4 hosts](records/suite-4-hosts.png)" in text
    assert (tmp_path / "records" / "suite-4-hosts.png").read_bytes().startswith(b"\x89PNG")
    assert "Not measured here: horovod (horovod is not installed)." in text
    assert "alexnet, 4 hosts" in capfd.readouterr().out


def test_it_resumes(ran: list[Settings], tmp_path: Path):
    first = next(suite.run(TWO, tmp_path, say=nothing, watch=nothing))
    assert first[0] == TWO[0]
    said: list[str] = []
    (second,) = suite.run(TWO, tmp_path, say=said.append, watch=nothing)
    assert second[0] == TWO[1]
    assert len(ran) == 2
    assert said[0] == "1 of 2 have a record: they are not run again."
    assert list(suite.run(TWO, tmp_path, say=nothing, watch=nothing)) == []
    assert list(suite.read(tmp_path)) == TWO


def test_a_failure_keeps_what_was_recorded(
    ran: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    going = suite.run(TWO, tmp_path, say=nothing, watch=nothing)
    next(going)

    def fails(*_: object, **__: object) -> Result:
        raise SoonestError("a rank ended")

    monkeypatch.setattr(suite.session, "run", fails)
    with pytest.raises(SoonestError):
        next(going)
    assert list(suite.read(tmp_path)) == TWO[:1]


@pytest.mark.parametrize(("over_bound", "kept"), [(1.02, False), (1.07, True)])
def test_a_timeline_is_kept_where_it_shows_what_went_wrong(
    over_bound: float, kept: bool, ran: list[Settings], tmp_path: Path
):
    list(suite.run(TWO[:1], tmp_path, say=nothing, watch=nothing))
    result = result_of(ran[0], "alexnet", soonest_over_bound=over_bound)
    suite.write(result, tmp_path / "x.json")
    assert ("timelines" in json.loads((tmp_path / "x.json").read_text())) is kept


def test_records_can_be_shown_again(
    ran: list[Settings], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    list(suite.run(TWO, tmp_path, say=nothing, watch=nothing))
    files = [str(case.file(tmp_path)) for case in TWO]
    picture = tmp_path / "all.png"
    assert main(["bench", "--show", *files, "--picture", str(picture)]) == 0
    out = capfd.readouterr().out
    assert "alexnet, 2 hosts" in out
    assert "alexnet, 4 hosts" in out
    assert picture.exists()


def test_the_best_other_arm_communicates(ran: list[Settings], tmp_path: Path):
    list(suite.run(TWO[:1], tmp_path, say=nothing, watch=nothing))
    (result,) = suite.read(tmp_path).values()
    assert page.best_other(result.rows()).arm == "fsdp2"


def test_a_record_of_something_else_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    file = tmp_path / "other.json"
    file.write_text('{"arms": {"ddp": {"step_ms": 1.0}}}')
    assert main(["bench", "--show", str(file)]) == 2
    err = capfd.readouterr().err
    assert "other.json is no record of soonest bench: 'trace' is missing" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trace", "no-such"], "no trace 'no-such'"),
        (["--arms", "ddp,magic"], "no arm 'magic': there are local,"),
        (["--arms", "ddp,ddp"], "arm 'ddp' is named twice"),
        (["--arms", "a:b:c"], "no arm 'a:b:c': there are local,"),
        (["--arms", "no.such:arm"], "no module 'no.such' for arm 'no.such:arm'"),
        (["--hosts", "1"], "1 is too few: give 2 or more"),
        (["--link", "fast"], "'fast' is no rate"),
        (["--link", "0x"], "'0x' is no load"),
        (["--slow-motion", "0"], "0 is out of range: give a number above zero"),
        (["--shrink", "big"], "'big' is not a number"),
        (["--json", "/no/such/folder/x.json"], "no folder /no/such/folder"),
        (["--show", "/no/such/record"], "cannot read /no/such/record: No such file"),
        (["--suite", "--link", "10gbit"], "the suite's links are given by load"),
        (["--arms", "soonest-magic"], "no arm 'soonest-magic': there are local,"),
        (["--method", "magic"], "no method 'magic' for the arm soonest: there are allreduce,"),
        (["--method", "hierarchical"], "'hierarchical' cannot be had here: it needs several"),
        (["--method", "gather", "--arms", "ddp"], "--method is for the arm soonest: name it"),
        (["--suite", "--method", "split"], "the suite chooses that itself: leave out --method"),
        (["--methods", "--suite"], "not allowed with argument --methods"),
        (["--methods", "--link", "1x"], "--methods needs the rate of the links, not a load"),
        (["--methods", "--link", "9"], "9"),
        (
            ["--methods", "--trace", "vgg16", "--slow-motion", "2"],
            "--methods trains nothing: leave out --trace, --slow-motion",
        ),
        (["--suite", "--shrink", "2"], "the suite chooses that itself: leave out --shrink"),
        (["--suite", "--show", "x"], "not allowed with argument --suite"),
    ],
)
def test_wrong_requests(words: list[str], said: str, capfd: pytest.CaptureFixture[str]):
    assert main(["bench", *words]) == 2
    err = capfd.readouterr().err
    assert said in err
    assert err.count("\n") == 1
