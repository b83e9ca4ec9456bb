"""``soonest env``: what a bug report needs to say of a machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from soonest.cli.request import new_file
from soonest.writing import write_json

_PACKAGES = ("soonest", "torch", "numpy")
_PREFIXES = ("SOONEST_", "GLOO_", "NCCL_", "TORCH_", "CUDA_", "OMP_", "MASTER_", "RANK", "WORLD_")


def add_to(commands: Any) -> None:
    env = commands.add_parser(
        "env",
        help="print what a bug report needs: versions, backends, network interfaces, cache",
        description="Prints what a bug report needs to say of this machine.",
    )
    env.add_argument("--json", type=new_file, metavar="FILE", help="write it to this file, too")
    env.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found = gathered()
    for what, value in found.items():
        lines = [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else value
        lines = [str(lines)] if not isinstance(lines, list) else lines
        print(f"{what + ':':12}{lines[0] if lines else 'none'}")
        for line in lines[1:]:
            print(f"{'':12}{line}")
    if args.json:
        write_json(args.json, found)
    return 0


def gathered() -> dict[str, Any]:
    """By subject, what there is to say."""
    return {
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "processors": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        **_of_torch(),
        "interfaces": _interfaces(),
        "host": _host(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_PREFIXES)},
        "cache": _cache(),
        "executable": sys.executable,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "is not installed"


def _of_torch() -> dict[str, Any]:
    try:
        import torch
        import torch.distributed as dist
        from torch.cuda import nccl
    except Exception as error:
        return {"torch": f"cannot be imported: {error!r}"}
    backends = [name for name in ("gloo", "nccl", "mpi", "xccl") if dist.is_backend_available(name)]
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    if "nccl" in backends:
        backends.append(f"NCCL {'.'.join(map(str, nccl.version()))}")
    return {"backends": backends, "GPUs": gpus}


def _interfaces() -> list[str]:
    """Name, rate in Mbit/s where the driver says it, and whether it is up."""
    found: list[str] = []
    for _, name in socket.if_nameindex():
        about = Path("/sys/class/net", name)
        state = _read(about / "operstate") or "?"
        rate = _read(about / "speed")
        known = rate is not None and rate.isdigit() and int(rate) > 0
        found.append(f"{name} {state}" + (f", {rate} Mbit/s" if known else ""))
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return None


def _host() -> str:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return f"{name}, which resolves to nothing: {error}"
    loopback = ", which other hosts cannot reach" if address.startswith("127.") else ""
    return f"{name}, at {address}{loopback}"


def _cache() -> dict[str, str] | str:
    from soonest.runtime.tuning.cache import folder

    place = folder()
    if place is None:
        return "nothing is remembered: SOONEST_CACHE is empty"
    files = sorted(place.glob("*.json")) if place.is_dir() else []
    damaged = [file.name for file in files if not _is_readable(file)]
    told = f"{len(files)} files" + (f", damaged: {', '.join(damaged)}" if damaged else "")
    return {str(place): told}


def _is_readable(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
