"""What can only be checked on a GPU, in under 8 minutes, on a machine with one or more of them.

    python benchmarks/gpu_check.py --json benchmarks/records/gpu.json

It compares results with DistributedDataParallel, bit by bit where that is possible; looks for hosts
that wait and for races; measures what a step costs beside plain training; and records per-layer
traces for ``soonest predict``. Every part runs in processes of its own, so one that fails or hangs
costs no other, and the record is written anew after each. It prints one table, and ends with 0 if
all is as it should be, with 1 if something is not, and with 2 where there is no GPU.

soonest has to be importable: install it, or set ``PYTHONPATH=src``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_S = 460.0
_MOST_RANKS = 8
_LEAST_S = 15.0
"""A part is not begun with less."""
RANK = (sys.executable, str(Path(__file__).resolve()), "--as-rank")
"""What a rank runs, and behind it the part, its backend, a folder, and the part's own words."""


@dataclass(frozen=True)
class Part:
    """One thing to check, in processes of its own.

    Args:
        what: a function of ``gpu_rank``.
        name: for the table.
        ranks: how many processes.
        backend: of their process group.
        limit_s: how long it may take.
        words: further arguments.
    """

    what: str
    name: str
    limit_s: float
    ranks: int = 1
    backend: str = "nccl"
    words: tuple[str, ...] = ()


@dataclass
class Row:
    """What was found.

    Args:
        ok: whether it is as it should be; None if that was not asked or is not known.
        found: in words.
        figures: for the record.
    """

    name: str
    ok: bool | None
    found: str
    figures: dict[str, Any] = field(default_factory=dict[str, Any])


def parts_for(gpus: int) -> list[Part]:
    """What to check with so many GPUs, the most important first."""
    several = min(gpus, _MOST_RANKS)
    parts = [Part("parity", "as DDP, 1 rank, NCCL", 100)]
    if several > 1:
        parts.append(Part("parity", f"as DDP, {several} ranks, NCCL", 120, several))
    parts += [
        Part("quiet", "the host never waits", 40),
        Part("races", "no race, says torch's sanitizer", 40),
        Part("parity", "as DDP, 2 ranks, gloo", 120, 2, "gloo"),
        Part("graphs", "graphs are refused", 30),
        Part("overhead", "a step of ResNet-50", 60, words=("resnet50",)),
        Part("overhead", "a step of GPT-2 small", 60, words=("gpt2-small",)),
        Part("overlap", "updates and sending overlap", 60, several),
        Part("host", "time of hooks and landings", 40),
        Part("traces", "per-layer traces", 90),
    ]
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--traces", type=Path, help="folder for traces and the profiler's trace")
    parser.add_argument("--only", help="names of parts, comma-separated: parity,quiet,...")
    parser.add_argument("--as-rank", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        import gpu_rank

        gpu_rank.run(*args.as_rank)
        return 0
    import torch

    if not torch.cuda.is_available():
        print(
            "there is no GPU that this torch can use: run this on a machine with a CUDA device, "
            "with a torch that is built for it",
            file=sys.stderr,
        )
        return 2
    device = described()
    parts = parts_for(device["count"])
    if args.only:
        chosen = args.only.split(",")
        if unknown := set(chosen) - {part.what for part in parts}:
            known = ", ".join(dict.fromkeys(part.what for part in parts))
            parser.error(f"--only: there is no part {min(unknown)!r}; there are {known}")
        parts = [part for part in parts if part.what in chosen]
    rows = check_all(parts, device, record=args.json, traces=args.traces)
    return 1 if any(row.ok is False for row in rows) else 0


def described() -> dict[str, Any]:
    """What it runs on."""
    import torch
    from torch.cuda import nccl

    return {
        "name": torch.cuda.get_device_name(),
        "count": torch.cuda.device_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl.version())),
    }


def check_all(
    parts: Sequence[Part], device: dict[str, Any], *, record: Path | None, traces: Path | None
) -> list[Row]:
    """Checks one part after the other, prints a row for each, and writes all so far each time.

    Args:
        parts: what to check.
        device: what ``described`` says.
        record: file to write; none if None.
        traces: folder for traces; they are thrown away if None.
    """
    print(
        f"{device['count']} × {device['name']}, torch {device['torch']}, CUDA {device['cuda']}, "
        f"NCCL {device['nccl']}",
        flush=True,
    )
    width = max((len(part.name) for part in parts), default=0)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SOONEST_CACHE"] = cache
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        folder = (traces or Path(cache)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for row in _rows(parts, folder):
            rows.append(row)
            sign = {True: "ok", False: "FAILED", None: "-"}[row.ok]
            print(f"{row.name:{width}}  {sign:6}  {row.found}", flush=True)
            if record:
                found = [{"name": r.name, "ok": r.ok, "found": r.found, **r.figures} for r in rows]
                text = json.dumps({"device": device, "rows": found}, indent=1)
                record.write_text(text + "\n", encoding="utf-8")
    return rows


def _rows(parts: Sequence[Part], folder: Path) -> Iterator[Row]:
    end_s = time.monotonic() + LIMIT_S
    for part in parts:
        left_s = end_s - time.monotonic()
        if left_s < _LEAST_S:
            yield Row(part.name, None, "left out: no time was left")
            continue
        print(f"{part.name} …", file=sys.stderr, flush=True)
        yield row_of(part, min(part.limit_s, left_s), folder)


def row_of(part: Part, limit_s: float, folder: Path) -> Row:
    """Runs a part."""
    from soonest.lab import Loopback
    from soonest.lab.messages import listen

    told: list[dict[str, Any]] = []
    said: list[str] = []
    error: Exception | None = None
    began_s = time.monotonic()
    try:
        with Loopback(part.ranks) as place:
            listen(
                place,
                [*RANK, part.what, part.backend, str(folder), *part.words],
                lambda rank, message: told.append(message),
                say=said.append,
                timeout_s=limit_s,
                preload=False,  # a fork of a process that has looked for GPUs cannot use them
            )
    except Exception as caught:  # whatever it is, the other parts go on
        error = caught
    found = [message["found"] for message in told if message["found"]]
    figures: dict[str, Any] = {
        "took_s": round(time.monotonic() - began_s, 1),
        "ranks": [message["figures"] for message in told],
    }
    if error is not None:
        for line in said:
            print(line, file=sys.stderr, flush=True)
        if not any(message["ok"] is False for message in told):
            found += [line for line in reversed(said) if "Error" in line][:1]
        found.append(str(error))
        figures["said"] = said
    elif not told:
        found.append("no rank has told anything")
    sure = [message["ok"] for message in told if message["ok"] is not None]
    ok = all(sure) if sure or not told else None
    words = "; ".join(line[:300] for line in dict.fromkeys(found))
    return Row(part.name, False if error is not None or not told else ok, words, figures)


if __name__ == "__main__":
    sys.exit(main())
