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
`shard_optimizer=True`, on 2 ranks. *Refused* is what then cannot be, with a sentence that says so.
What an empty cell stands for is not run: it depends on nothing that the others do not show. This
page is generated, and compared with the cases:

    cd tests; python -m parity.page

| run | 2 ranks | 4 ranks | sharded |
|---|---|---|---|
"""


_REFUSED = ("complex numbers", "uneven inputs", "GAN: two models, two optimizers")
"""With ``shard_optimizer=True``. The GAN adds to gradients of which each rank has but its part."""


def page() -> str:
    """The page for the cases as they are."""
    rows: list[str] = []
    for name in (name for name, case in CASES.items() if not case.sharded):
        sharded = "bitwise" if f"{name}, sharded" in CASES else ""
        sharded = "refused" if name in _REFUSED else sharded
        rows.append(f"| {name} | bitwise | {'rounding' if name in OF_FOUR else ''} | {sharded} |")
    text = _HEAD.format(steps=STEPS) + "\n".join(rows) + "\n"
    return text.replace("|  |", "| |").replace("|  |", "| |")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
