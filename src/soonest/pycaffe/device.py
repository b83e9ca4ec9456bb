"""What pycaffe says of devices, random numbers and processes."""

from __future__ import annotations

import torch

from soonest.caffe.io.log import to_stderr
from soonest.caffe.net.registry import LAYERS

_told: set[str] = set()


def set_mode_cpu() -> None:
    """Nets compute on the CPU, as they do anyway."""


def set_mode_gpu() -> None:
    """Taken for scripts' sake; nets compute on the CPU, which is said once."""
    if "gpu" not in _told:
        _told.add("gpu")
        to_stderr("Use CPU. GPUs are not supported: set_mode_gpu is not used.")


def set_device(device: int) -> None:
    """Taken for scripts' sake."""


def set_random_seed(seed: int) -> None:
    """Of fillers, dropout, crops and mirrors."""
    torch.manual_seed(seed)


def layer_type_list() -> list[str]:
    """Types of layers that a net may have."""
    return sorted(LAYERS)


def init_log(level: int = 0, stderr: bool = True) -> None:
    """Taken for scripts' sake: lines go to stderr."""


def log(message: str) -> None:
    """Writes a line as nets and solvers do."""
    to_stderr(message)


def has_nccl() -> bool:
    """No: several processes train together under ``soonest lab run`` or torchrun."""
    return False


def solver_count() -> int:
    """How many solvers train together in this process."""
    return 1


def solver_rank() -> int:
    """Which of them this is."""
    return 0


def set_solver_count(count: int) -> None:
    """Taken for scripts' sake, if it is one."""
    if count != 1:
        raise ValueError(
            f"{count} solvers cannot train together here: run the solver's prototxt with 'soonest "
            "lab run -- soonest caffe train', or under torchrun"
        )


def set_solver_rank(rank: int) -> None:
    """Taken for scripts' sake."""


def set_multiprocess(multiprocess: bool) -> None:
    """Taken for scripts' sake."""
