"""The lab's little sister: ranks on this machine, over its own loopback."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Collection, Mapping, Sequence

from soonest.lab.launch import OnFailure, OnLine, run_ranks
from soonest.lab.rank import Rank, torchrun_env


class Loopback:
    """Ranks on this machine over plain loopback: needs no root, and shapes nothing.

    Args:
        ranks: how many.

    Raises:
        ValueError: fewer than one rank.
    """

    def __init__(self, ranks: int = 2) -> None:
        if ranks < 1:
            raise ValueError(f"{ranks} ranks asked for: a run needs at least one")
        self.ranks = ranks

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        preload: bool | None = None,
        on_line: OnLine | None = None,
        on_failure: OnFailure | None = None,
        timeout_s: float | None = None,
        passed_on: Collection[signal.Signals] = (),
    ) -> int:
        """Runs the command once per rank, as ``Lab.run`` does.

        Args:
            command: program and arguments.
            env: variables to add to this process's environment.
            preload, on_line, on_failure, timeout_s, passed_on: as for ``run_ranks``.

        Returns:
            0, or the code of the rank that failed first.

        Raises:
            ValueError: there is no such command, or it cannot be preloaded.
            TimeoutError: the ranks did not end in time.
            KeyboardInterrupt: as for ``run_ranks``.
        """
        port = _free_port()
        interface = "lo" if sys.platform == "linux" else "lo0"
        ranks = [
            Rank(
                torchrun_env(
                    env,
                    rank=rank,
                    ranks=self.ranks,
                    one_host=True,
                    address="127.0.0.1",
                    port=port,
                    interface=interface,
                ),
            )
            for rank in range(self.ranks)
        ]
        return run_ranks(
            command,
            ranks,
            preload=preload,
            on_line=on_line,
            on_failure=on_failure,
            timeout_s=timeout_s,
            passed_on=passed_on,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
