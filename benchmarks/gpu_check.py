"""What can only be checked on a GPU, in under 8 minutes, on a machine with one or more of them.

    python benchmarks/gpu_check.py --json benchmarks/records/gpu.json

It compares results with DistributedDataParallel, bit by bit where that is possible; looks for hosts
that wait and for races; measures what a step costs beside plain training; and records per-layer
traces for ``soonest predict``. It prints one table, and ends with 0 if all is as it should be, with
1 if something is not, and with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_S = 460.0
GOAL = 1.01
_MOST_RANKS = 8


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
    parts = [Part("parity", "as DDP, 1 rank, NCCL", 90)]
    if several > 1:
        parts.append(Part("parity", f"as DDP, {several} ranks, NCCL", 90, several))
    parts += [
        Part("quiet", "the host never waits", 40),
        Part("races", "no race, says torch's sanitizer", 40),
        Part("parity", "as DDP, 2 ranks, gloo", 90, 2, "gloo"),
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
    rows, device = check_all(args)
    show(rows, device)
    if args.json:
        record = {
            "device": device,
            "rows": [{"name": r.name, "ok": r.ok, "found": r.found, **r.figures} for r in rows],
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row.ok is False for row in rows) else 0


def check_all(args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    import torch
    from torch.cuda import nccl

    gpus = torch.cuda.device_count()
    device = {
        "name": torch.cuda.get_device_name(),
        "count": gpus,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl.version())),
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SOONEST_CACHE"] = cache
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        folder = args.traces or Path(cache)
        folder.mkdir(parents=True, exist_ok=True)
        end_s = time.monotonic() + LIMIT_S
        for part in parts_for(gpus):
            if args.only and part.what not in args.only.split(","):
                continue
            left_s = end_s - time.monotonic()
            if left_s < 15:
                rows.append(Row(part.name, None, "left out: no time was left"))
                continue
            print(f"{part.name} …", file=sys.stderr, flush=True)
            rows.append(row_of(part, min(part.limit_s, left_s), folder))
    return rows, device


def row_of(part: Part, limit_s: float, folder: Path) -> Row:
    """Runs a part."""
    from soonest.errors import SoonestError
    from soonest.lab import Loopback
    from soonest.lab.messages import listen

    told: list[dict[str, Any]] = []
    said: list[str] = []
    command = [sys.executable, __file__, "--as-rank", part.what, part.backend, str(folder)]
    began_s = time.monotonic()
    try:
        with Loopback(part.ranks) as place:
            listen(
                place,
                [*command, *part.words],
                lambda rank, message: told.append(message),
                say=said.append,
                timeout_s=limit_s,
            )
    except SoonestError as error:
        for line in said:
            print(line, file=sys.stderr)
        last = next((line for line in reversed(said) if "Error" in line), str(error))
        return Row(part.name, False, last[:160], {"said": said})
    took_s = time.monotonic() - began_s
    ok = all(message["ok"] is not False for message in told)
    known = any(message["ok"] is not None for message in told)
    found = "; ".join(dict.fromkeys(m["found"] for m in told if m["found"]))
    figures = {"took_s": round(took_s, 1), "ranks": [message["figures"] for message in told]}
    return Row(part.name, (ok and bool(told)) if known or not told else None, found, figures)


def show(rows: Sequence[Row], device: dict[str, Any]) -> None:
    print(
        f"{device['count']} × {device['name']}, torch {device['torch']}, CUDA {device['cuda']}, "
        f"NCCL {device['nccl']}"
    )
    width = max(len(row.name) for row in rows)
    for row in rows:
        sign = {True: "ok", False: "FAILED", None: "-"}[row.ok]
        print(f"{row.name:{width}}  {sign:6}  {row.found}")


if __name__ == "__main__":
    sys.exit(main())
