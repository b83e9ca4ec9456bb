"""Emulated hosts: network namespaces joined by a switch over links of a chosen rate.

The namespaces have no name. Open files of this process and the processes inside keep them alive, so
they vanish with these, links and all, however this process ends: nothing is ever left to clean up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from itertools import count

from soonest.lab.launch import OnLine, Rank, check_command, run_ranks, torchrun_env

_CLONE_NEWNET = 0x40000000
_TOOLS = ("ip", "tc", "nsenter", "setpriv")
_MOST_HOSTS = 1000
_INTERFACE = "eth0"
_FIRST_PORT = 29500

# What a link that was idle may send at once. Less, and it loses time whenever the kernel's timer is
# late; more, and it would not look like a link of its rate to small messages.
_BURST_S = 1e-3
PAYLOAD_SHARE = 1448 / 1514
"""Of a link's rate, what is left for payload: TCP over IPv4 with time stamps, full frames."""

# The kernel hands packets of up to 64 KiB to a link. Half a burst is best: what does not fit into a
# burst would be cut to pieces at a great cost of CPU.
_PACKET_S = _BURST_S / 2
_LEAST_PACKET_BYTES, _MOST_PACKET_BYTES = 6000, 1 << 16
_QUEUE_S = 50e-3
_LEAST_QUEUE_BYTES = 32 << 10


class Lab:
    """Hosts in this machine, each with one link to a common switch.

    What is inside sees only the lab: its own loopback and its link, ``eth0``.

    Args:
        hosts: how many.
        link_bps: rate of every link in each direction, bits per second, headers included.

    Raises:
        ValueError: the number of hosts or the rate makes no sense.
    """

    def __init__(self, hosts: int, link_bps: float) -> None:
        if not 1 <= hosts <= _MOST_HOSTS:
            raise ValueError(f"{hosts} hosts asked for: a lab has 1 to {_MOST_HOSTS}")
        _check_rate(link_bps)
        self.hosts = hosts
        self.link_bps = link_bps
        self._namespaces: list[int] = []
        self._ports = count(_FIRST_PORT)

    def __enter__(self) -> Lab:
        """Makes the hosts.

        Raises:
            RuntimeError: the lab cannot run here; the message says why and what to do about it.
        """
        if reason := _missing():
            raise RuntimeError(reason)
        try:
            self._namespaces = _make_namespaces(self.hosts + 1)
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for namespace in self._namespaces:
            os.close(namespace)
        self._namespaces = []

    def address(self, host: int) -> str:
        """The host's address on the lab's network."""
        self._check_host(host)
        return f"10.77.{(host + 1) >> 8}.{(host + 1) & 255}"

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        on_line: OnLine | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Runs the command once per host, with the variables that torchrun sets.

        Args:
            command: program and arguments.
            env: variables to add to this process's environment.
            on_line: gets ``(rank, line)`` for every line of output, in the calling thread; by
                default lines are printed as ``[rank] line``.
            timeout_s: end all ranks after so many seconds.

        Returns:
            0 if all ranks returned 0, otherwise the code of the one that failed first, upon which
            the others are ended.

        Raises:
            ValueError: there is no such command.
            TimeoutError: the ranks did not end in time.
        """
        if not self._namespaces:
            raise RuntimeError("the lab is not open: use it as `with Lab(...) as lab`")
        check_command(command, env)
        port = next(self._ports)
        ranks = [
            Rank(
                ["nsenter", f"--net=/proc/self/fd/{self._namespaces[host]}", *command],
                torchrun_env(
                    env,
                    rank=host,
                    ranks=self.hosts,
                    one_host=False,
                    address=self.address(0),
                    port=port,
                    interface=_INTERFACE,
                ),
                pass_fds=(self._namespaces[host],),
            )
            for host in range(self.hosts)
        ]
        return run_ranks(ranks, on_line=on_line, timeout_s=timeout_s)

    def set_link(self, host: int, bps: float) -> None:
        """Changes the rate of a host's link, both directions, also while something runs.

        Args:
            host: 0 to ``hosts - 1``.
            bps: the new rate in bits per second.
        """
        self._check_host(host)
        _check_rate(bps)
        self._shape("change", host, bps)

    def cut(self, host: int) -> None:
        """Unplugs a host's link; what is sent meanwhile is lost, and TCP sends it again later."""
        self._check_host(host)
        self._configure(self._switch, "ip", [f"link set port{host} down"])

    def mend(self, host: int) -> None:
        """Plugs a host's link in again."""
        self._check_host(host)
        self._configure(self._switch, "ip", [f"link set port{host} up"])

    @property
    def _switch(self) -> int:
        return self._namespaces[self.hosts]

    def _connect(self) -> None:
        switch = ["link add switch type bridge stp_state 0 mcast_snooping 0", "link set switch up"]
        for host in range(self.hosts):
            namespace = f"/proc/self/fd/{self._namespaces[host]}"
            switch += [
                f"link add port{host} type veth peer name {_INTERFACE} netns {namespace}",
                f"link set port{host} addrgenmode none master switch up",
            ]
        self._configure(self._switch, "ip", switch)
        for host in range(self.hosts):
            inside = [
                "link set lo up",
                f"addr add {self.address(host)}/16 dev {_INTERFACE}",
                f"link set {_INTERFACE} addrgenmode none up",
            ]
            self._configure(self._namespaces[host], "ip", inside)
            self._shape("add", host, self.link_bps)

    def _shape(self, verb: str, host: int, bps: float) -> None:
        bytes_per_s = bps / 8
        packet = int(bytes_per_s * _PACKET_S)
        packet = min(max(packet, _LEAST_PACKET_BYTES), _MOST_PACKET_BYTES)
        burst = max(int(bytes_per_s * _BURST_S), 2 * packet)
        limit = burst + max(int(bytes_per_s * _QUEUE_S), _LEAST_QUEUE_BYTES)
        shape = f"root tbf rate {bps:.0f}bit burst {burst}b limit {limit}b"
        inside = self._namespaces[host]
        self._configure(inside, "ip", [f"link set {_INTERFACE} gso_max_size {packet}"])
        self._configure(inside, "tc", [f"qdisc {verb} dev {_INTERFACE} {shape}"])
        self._configure(self._switch, "tc", [f"qdisc {verb} dev port{host} {shape}"])

    def _configure(self, namespace: int, tool: str, lines: Sequence[str]) -> None:
        done = subprocess.run(
            ["nsenter", f"--net=/proc/self/fd/{namespace}", tool, "-batch", "-"],
            input="\n".join(lines),
            pass_fds=self._namespaces,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[0]
            raise RuntimeError(
                f"{tool} could not set up the lab's network (it says: {said}): the kernel must "
                "have veth, bridge and sch_tbf, try `modprobe veth bridge sch_tbf`"
            )

    def _check_host(self, host: int) -> None:
        if not 0 <= host < self.hosts:
            raise ValueError(f"no host {host}: this lab has hosts 0 to {self.hosts - 1}")


def unavailable() -> str | None:
    """Why the lab cannot run here and what to do about it, one sentence; None if it can."""
    try:
        with Lab(hosts=1, link_bps=1e9):
            return None
    except RuntimeError as error:
        return str(error)


def _missing() -> str | None:
    if sys.platform != "linux":
        return (
            f"the lab needs Linux and this is {sys.platform}: use a virtual machine with Linux, or "
            "run the ranks over loopback"
        )
    lacking = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if lacking:
        return (
            f"the lab needs {', '.join(lacking)}, not found on PATH: install the packages iproute2 "
            "and util-linux"
        )
    return None


def _make_namespaces(number: int) -> list[int]:
    """Makes network namespaces and returns an open file of each, which keeps it alive.

    A thread of its own makes them, as it ends up inside the last one.
    """
    made: list[int] = []
    errors: list[OSError] = []

    def make() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            for _ in range(number):
                if libc.unshare(_CLONE_NEWNET):
                    error = ctypes.get_errno()
                    raise OSError(error, os.strerror(error))
                _use_cubic()
                made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=make, name="soonest-lab-namespaces")
    thread.start()
    thread.join()
    if errors:
        for namespace in made:
            os.close(namespace)
        raise RuntimeError(
            f"the lab may not make network namespaces ({errors[0].strerror}): run as root, or run "
            "the ranks over loopback"
        )
    return made


def _use_cubic() -> None:
    """Sets this thread's namespace to the usual congestion control, whatever this machine uses.

    Not being able to is no obstacle: the rates are right with any.
    """
    with contextlib.suppress(OSError), open("/proc/sys/net/ipv4/tcp_congestion_control", "w") as f:
        f.write("cubic")


def _check_rate(bps: float) -> None:
    if not 1e3 <= bps < 1e12:
        raise ValueError(f"a link of {bps:g} bit/s: rates are 1e3 to 1e12 bits per second")
