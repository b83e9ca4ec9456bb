"""The page of all cases that are compared with DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

from parity.cases import CASES, OF_FOUR, STEPS

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"

_HEAD = """\
# The same results as DistributedDataParallel

Each row is a training run that `tests/parity` makes with `DistributedDataParallel` and with
`soonest.prioritize`, on CPUs and gloo, from the same start, with different data on every rank.
After {steps} steps all is compared: parameters, buffers, gradients, the optimizer's state, the
losses and whatever else the run has read on its way. *Bitwise* means equal in every bit;
*rounding*, equal within what adding up in another order does to the last bits. *Sharded* is with
`shard_optimizer=True`, on 2 ranks. What an empty cell stands for is not run: it depends on nothing
that the others do not show. This page is generated, and compared with the cases:

    cd tests; python -m parity.page

| run | 2 ranks | 4 ranks | sharded |
|---|---|---|---|
"""


def page() -> str:
    """The page for the cases as they are."""
    rows = [
        f"| {name} | bitwise | {'rounding' if name in OF_FOUR else ''} "
        f"| {'bitwise' if f'{name}, sharded' in CASES else ''} |"
        for name, case in CASES.items()
        if not case.sharded
    ]
    text = _HEAD.format(steps=STEPS) + "\n".join(rows) + "\n"
    return text.replace("|  |", "| |").replace("|  |", "| |")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
