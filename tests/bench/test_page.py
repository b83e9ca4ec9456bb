"""The standing table, read line by line."""

from __future__ import annotations

from soonest.bench.page import _table, best_other, panel
from soonest.bench.result import Result
from soonest.bench.suite import Case


def result(**step_ms: float) -> Result:
    arms = {
        name.replace("_", "-"): {"step_ms": ms, "load": 0.1, "compute_error": 0.0}
        for name, ms in step_ms.items()
    }
    figures = {"compute_ms": 30.0, "communication_ms": 20.0, "bound_ms": 32.0}
    return Result({"trace": "t", "hosts": 4, "link_bps": 1e9, "arms": arms, **figures})


TIMES = {"local": 30.0, "ddp": 60.0, "ddp_tuned": 45.0, "fsdp2": 40.0, "soonest": 36.0}


def test_a_row_of_the_table():
    head, _, row = _table({Case("alexnet", 4, 0.5): result(**TIMES)})
    titles = [cell.strip() for cell in head.strip("|").split("|")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert list(zip(titles, cells, strict=True)) == [
        ("model", "alexnet"),
        ("synchronizing", "0.5 ×"),
        ("bound, ms", "32.00"),
        ("soonest, ms", "36.00"),
        ("× bound", "1.125"),
        ("ddp-tuned, ms", "45.00"),
        ("speed-up", "1.250"),
        ("best other", "fsdp2"),
        ("speed-up", "1.111"),
    ]


def test_the_best_rival_is_another_that_communicates():
    assert best_other(result(**TIMES).rows()).arm == "fsdp2"
    assert best_other(result(**{**TIMES, "fsdp2": 90.0}).rows()).arm == "ddp-tuned"


def test_a_panel_shows_what_communicates_in_its_order():
    shown = panel(result(**TIMES), "Title")
    assert (shown.title, shown.bound_ms, shown.highlight) == ("Title", 32.0, "soonest")
    assert shown.step_ms == {"ddp": 60.0, "ddp-tuned": 45.0, "fsdp2": 40.0, "soonest": 36.0}
