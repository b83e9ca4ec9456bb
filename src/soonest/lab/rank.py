"""One rank: its environment, and how a process becomes it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Protocol


@dataclass(frozen=True)
class Rank:
    """Where one rank runs.

    Args:
        env: its whole environment.
        namespace: path of the network namespace that it lives in, if that is not this process's.
    """

    env: Mapping[str, str]
    namespace: str | None = None


class Process(Protocol):
    """A rank that was started; it leads a process group of its own."""

    @property
    def pid(self) -> int: ...
    @property
    def stdout(self) -> IO[bytes] | None: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


def start(command: Sequence[str], rank: Rank) -> Process:
    """Starts a command as a rank."""
    enter = [] if rank.namespace is None else ["nsenter", f"--net={rank.namespace}"]
    return subprocess.Popen(
        [*ending_with_parent(), *enter, *command],
        env=rank.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Ctrl-C in a terminal then reaches only this process, which ends the ranks once.
        process_group=0,
    )


def ending_with_parent() -> list[str]:
    """What to put before a command that the kernel should kill with the thread that starts it."""
    return ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []


def find_program(command: Sequence[str], env: Mapping[str, str]) -> str:
    """The path of a command's program.

    Raises:
        ValueError: there is none on the PATH that it will see.
    """
    program = command[0] if command else ""
    found = shutil.which(program, path=env.get("PATH"))
    if found is None:
        raise ValueError(f"no command {program!r} here: give a program on PATH, or its path")
    return found


def torchrun_env(
    env: Mapping[str, str] | None,
    *,
    rank: int,
    ranks: int,
    one_host: bool,
    address: str,
    port: int,
    interface: str,
) -> dict[str, str]:
    """The environment that torchrun would give to a rank.

    Args:
        env: added to this process's environment; wins over all but the torchrun variables.
        rank: of ``ranks``.
        one_host: whether all ranks share one host, or each has its own.
        address, port: where rank 0 listens.
        interface: network interface that gloo binds to.
    """
    defaults = {
        "GLOO_SOCKET_IFNAME": interface,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        # What was measured on other links does not hold here.
        "SOONEST_CACHE": "",
        # Without it every rank warns that the lab has no name server.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    # An interface named for the world outside does not exist inside.
    outer = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    numbers = {
        "RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_RANK": rank if one_host else 0,
        "LOCAL_WORLD_SIZE": ranks if one_host else 1,
        "GROUP_RANK": 0 if one_host else rank,
        "GROUP_WORLD_SIZE": 1 if one_host else ranks,
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": ranks,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }
    return {
        **defaults,
        **outer,
        **(env or {}),
        **{name: str(value) for name, value in numbers.items()},
        "ROLE_NAME": "default",
        "MASTER_ADDR": address,
        "TORCHELASTIC_RUN_ID": "soonest-lab",
        # Rank 0 serves the store itself: there is no agent that would.
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
