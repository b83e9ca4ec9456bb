"""What the lab needs of a machine, and what to do where something is missing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator

from soonest.lab.links import configure
from soonest.lab.namespaces import make_namespaces, path_of

_PACKAGES = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "setpriv": "util-linux"}
"""The programs that are used, and where they come from."""

_FEATURES = {
    "veth": ("ip", "link add one type veth peer name other"),
    "bridge": ("ip", "link add switch type bridge"),
    "sch_tbf": ("tc", "qdisc add dev lo root tbf rate 1mbit burst 10kb limit 100kb"),
}
"""The kernel's modules that are used, and what works only with each."""


def problems() -> list[str]:
    """Everything that keeps the lab from working here: a sentence each, with its remedy."""
    found = missing_programs()
    if sys.platform != "linux":
        return found
    try:
        namespace = make_namespaces(1)[0]
    except RuntimeError as error:
        return [*found, str(error)]
    try:
        return [*found, *_missing_features(path_of(namespace))]
    finally:
        os.close(namespace)


def unavailable() -> str | None:
    """Why the lab cannot run here and what to do about it, one sentence; None if it can."""
    return next(iter(problems()), None)


def missing_programs() -> list[str]:
    """What can be known of ``problems`` without trying anything."""
    if sys.platform != "linux":
        return [
            f"the lab needs Linux and this is {sys.platform}: use a virtual machine with Linux, or "
            "run the ranks over loopback"
        ]
    return [
        f"the lab needs {tool}, not found on PATH: install the package {package}"
        for tool, package in _PACKAGES.items()
        if shutil.which(tool) is None
    ]


def _missing_features(namespace: str) -> Iterator[str]:
    if shutil.which("nsenter") is None:
        return
    for module, (tool, line) in _FEATURES.items():
        if shutil.which(tool) is None:
            continue
        try:
            configure(namespace, tool, [line])
        except RuntimeError:
            yield (
                f"the lab needs a kernel with {module}, which this one does not load: try "
                f"`modprobe {module}`, or boot a kernel that has it"
            )
