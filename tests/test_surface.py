"""What others script against does not change by accident."""

from pathlib import Path

from surface import TEXT, surface, variables

METHODS_PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def test_the_public_surface_is_as_written_down() -> None:
    written = TEXT.read_text(encoding="utf-8").splitlines()
    now = surface().splitlines()
    gone = [line for line in written if line not in now]
    new = [line for line in now if line not in written]
    assert now == written, (
        f"no longer there: {gone}; new: {new}. If that is meant, say so in CHANGELOG.md, and run "
        "`python -m surface` in tests"
    )


def test_every_environment_variable_is_in_the_table() -> None:
    rows = [
        line.split("|")[1].strip(" `")
        for line in METHODS_PAGE.read_text().splitlines()
        if line.startswith("| `SOONEST")
    ]
    assert rows == variables()
