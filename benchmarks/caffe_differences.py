"""How far our layers and solvers are from real Caffe's, as two tables for `docs/caffe.md`.

The tests run the same cases. A difference of layers is the largest of any array of any case with
such a layer, over the array's peak or 1, whichever is more. Solvers train for 20 iterations; a
difference of weights is that of any value, one of histories is over their peak, one of losses
relative.

    python benchmarks/caffe_differences.py --json benchmarks/records/caffe-differences.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import golden_caffe as golden  # pyright: ignore[reportMissingImports]

from soonest.caffe.io import prototxt
from soonest.caffe.net.registry import LAYERS

Rows = dict[str, dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="where to write the record")
    args = parser.parse_args()
    torch.set_num_threads(1)  # These nets are tiny: threads would only wait for each other.
    found = {"layers": layers(), "solvers": solvers()}
    show("layer", found["layers"], ("cases", "forward", "backward"), beside=2)
    print()
    show("solver", found["solvers"], ("cases", "weights", "histories", "losses"))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def show(what: str, rows: Rows, columns: tuple[str, ...], *, beside: int = 1) -> None:
    """Prints a table in Markdown, by name, so many rows beside each other."""
    table = [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    table.sort(key=lambda cells: cells[0].lower())
    height = -(-len(table) // beside)
    table += [[""] * (len(columns) + 1)] * (beside * height - len(table))
    lines = [[what, *columns] * beside, ["---"] * (len(columns) + 1) * beside]
    lines += [list(itertools.chain(*table[place::height])) for place in range(height)]
    for cells in lines:
        print(f"| {' | '.join(cells)} |")


def _cell(value: float | None) -> str:
    if value is None or value == 0:
        return "" if value is None else "0"
    return f"{value:.0e}" if isinstance(value, float) else str(value)


def layers() -> Rows:
    """Of every type, those without a case, too."""
    rows: Rows = {type_: {"cases": 0} for type_ in LAYERS}
    home = Path.cwd()
    for folder, kind in ((golden.FOLDER, "layers"), (golden.SECOND, "layers"),
                         (golden.SECOND, "data")):  # fmt: skip
        for name, case in golden.index(f"{kind}/index.json", folder)["cases"].items():
            if case.get("by_formula"):
                continue
            os.chdir(folder / kind / ("" if kind == "layers" else name))
            arrays = golden.layer_arrays(name, folder) if kind == "layers" else None
            _add(rows, case, arrays or golden.data_arrays(name))
    os.chdir(home)
    return rows


def _add(rows: Rows, case: dict[str, Any], arrays: Iterable[tuple[str, Any, Any]]) -> None:
    """Counts a case for each type of layer in it."""
    apart = {"forward": 0.0, "backward": 0.0} if case.get("backward") else {"forward": 0.0}
    for key, found, wanted in arrays:
        way = "backward" if "diff" in key.partition("/")[0] else "forward"
        difference = float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))
        apart[way] = max(apart.get(way, 0.0), difference)
    for type_ in set(case["types"]) - {"Input"}:
        rows[type_]["cases"] += 1
        for way, difference in apart.items():
            rows[type_][way] = max(rows[type_].get(way, 0.0), difference)


def solvers() -> Rows:
    rows: Rows = defaultdict(lambda: {"cases": 0, "weights": 0.0, "histories": 0.0, "losses": 0.0})
    cases = [
        folder / "solvers" / name
        for folder in (golden.FOLDER, golden.SECOND)
        for name in golden.index("solvers/index.json", folder)["cases"]
    ]
    legacy = golden.FOLDER / "legacy"
    home = Path.cwd()
    for folder in [*cases, legacy / "v1_train", legacy / "hdf5"]:
        os.chdir(folder)
        large_batch = Path("reference/solver.prototxt")
        path = large_batch if large_batch.exists() else Path("solver.prototxt")
        solver = prototxt.read_solver(path)
        ending = ".h5" if folder.name == "hdf5" else ""
        wanted = json.loads(Path("expected/losses.json").read_text(encoding="utf-8"))
        row = rows[solver.type]
        row["cases"] += 1
        with tempfile.TemporaryDirectory() as to:
            run = golden.Run(solver, Path(to) / "run", "init.caffemodel", resume=False)
            for iteration in (10, 20):
                weights, history = golden.trained_apart(
                    folder, f"snap_iter_{iteration}", Path(to) / "run", iteration, ending
                )
                row["weights"] = max(row["weights"], weights)
                row["histories"] = max(row["histories"], history)
        losses = np.array([one["loss"] for one in wanted["iterations"]])
        row["losses"] = max(row["losses"], float(np.abs(np.array(run.losses) / losses - 1).max()))
    os.chdir(home)
    return dict(rows)


if __name__ == "__main__":
    sys.exit(main())
