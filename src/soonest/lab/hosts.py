"""Emulated hosts: network namespaces joined by a switch over links of a chosen rate.

The namespaces have no name. Open files of this process and the processes inside keep them alive, so
they vanish with these, links and all, however this process ends: nothing is ever left to clean up.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Mapping, Sequence
from itertools import count

from soonest.lab.launch import OnFailure, OnLine, run_ranks
from soonest.lab.links import INTERFACE, Links, address, check_host, check_rate
from soonest.lab.namespaces import make_namespaces, path_of
from soonest.lab.rank import Rank, torchrun_env
from soonest.lab.registry import Entry
from soonest.lab.requirements import missing_programs

_MOST_HOSTS = 1000
_FIRST_PORT = 29500


class Lab:
    """Hosts in this machine, each with one link to a common switch.

    What is inside sees only the lab: its own loopback and its link, ``eth0``.

    Args:
        hosts: how many.
        link_bps: rate of every link in each direction, bits per second, headers included.
        uplink_bps: rate at which hosts send, if it is another than that at which they receive: one
            for all hosts, or one for each.

    Raises:
        ValueError: the number of hosts or of rates, or a rate, makes no sense.
    """

    def __init__(
        self, hosts: int, link_bps: float, *, uplink_bps: float | Sequence[float] | None = None
    ) -> None:
        if not 1 <= hosts <= _MOST_HOSTS:
            raise ValueError(f"{hosts} hosts asked for: a lab has 1 to {_MOST_HOSTS}")
        if uplink_bps is None:
            uplink_bps = link_bps
        if isinstance(uplink_bps, int | float):
            uplink_bps = [uplink_bps] * hosts
        if len(uplink_bps) != hosts:
            raise ValueError(
                f"{len(uplink_bps)} uplinks for {hosts} hosts: give one rate for all, or one each"
            )
        for rate in (link_bps, *uplink_bps):
            check_rate(rate)
        self.hosts = hosts
        self.link_bps = link_bps
        self.uplinks_bps = tuple(uplink_bps)
        self._namespaces: list[int] = []
        self._entry: Entry | None = None
        self._ports = count(_FIRST_PORT)

    def __enter__(self) -> Lab:
        """Makes the hosts.

        Raises:
            RuntimeError: the lab cannot run here; the message says why and what to do about it.
        """
        for reason in missing_programs():
            raise RuntimeError(reason)
        try:
            self._namespaces = make_namespaces(self.hosts + 1)
            self._links.connect(self.link_bps, self.uplinks_bps)
            self._entry = Entry(self._namespaces, self.link_bps, self.uplinks_bps)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._entry:
            self._entry.close()
            self._entry = None
        for namespace in self._namespaces:
            os.close(namespace)
        self._namespaces = []

    def address(self, host: int) -> str:
        """The host's address on the lab's network."""
        check_host(host, self.hosts)
        return address(host)

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
        """Runs the command once per host, with the variables that torchrun sets.

        Args:
            command: program and arguments.
            env: variables to add to this process's environment.
            preload, on_line, on_failure, timeout_s, passed_on: as for ``run_ranks``.

        Returns:
            0 if all ranks returned 0, otherwise the code of the one that failed first, upon which
            the others are ended.

        Raises:
            ValueError: there is no such command, or it cannot be preloaded.
            TimeoutError: the ranks did not end in time.
            KeyboardInterrupt: as for ``run_ranks``.
        """
        namespaces = self._paths
        if self._entry:
            self._entry.note(command)
        port = next(self._ports)
        ranks = [
            Rank(
                torchrun_env(
                    env,
                    rank=host,
                    ranks=self.hosts,
                    one_host=False,
                    address=address(0),
                    port=port,
                    interface=INTERFACE,
                ),
                namespaces[host],
            )
            for host in range(self.hosts)
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

    def set_link(self, host: int, bps: float) -> None:
        """Changes the rate of a host's link, both directions, also while something runs.

        Args:
            host: 0 to ``hosts - 1``.
            bps: the new rate in bits per second.
        """
        self._links.set_rate(host, bps)

    def cut(self, host: int) -> None:
        """Unplugs a host's link; what is sent meanwhile is lost, and TCP sends it again later."""
        self._links.cut(host)

    def mend(self, host: int) -> None:
        """Plugs a host's link in again."""
        self._links.mend(host)

    @property
    def _links(self) -> Links:
        return Links(self._paths)

    @property
    def _paths(self) -> list[str]:
        if not self._namespaces:
            raise RuntimeError("the lab is not open: use it as `with Lab(...) as lab`")
        return [path_of(file) for file in self._namespaces]
