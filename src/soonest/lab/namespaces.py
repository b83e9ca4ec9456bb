"""Network namespaces without a name: an open file keeps each alive, and nothing else does."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading

_CLONE_NEWNET = 0x40000000


def make_namespaces(number: int) -> list[int]:
    """Makes network namespaces and returns an open file of each, which keeps it alive.

    Raises:
        RuntimeError: this process may not; the message says what to do about it.
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

    # A thread of its own, as it ends up inside the last one.
    thread = threading.Thread(target=make, name="soonest-lab-namespaces")
    thread.start()
    thread.join()
    if errors:
        for namespace in made:
            os.close(namespace)
        if errors[0].errno == errno.EMFILE:
            remedy = "allow more open files with `ulimit -n`, or ask for fewer hosts"
        else:
            remedy = "run as root, or run the ranks over loopback"
        raise RuntimeError(
            f"the lab may not make network namespaces ({errors[0].strerror}): {remedy}"
        )
    return made


def path_of(file: int, pid: int | None = None) -> str:
    """Where any process finds the namespace that a process, by default this one, has open."""
    return f"/proc/{pid or os.getpid()}/fd/{file}"


def _use_cubic() -> None:
    """Sets this thread's namespace to the usual congestion control, whatever this machine uses.

    Not being able to is no obstacle: the rates are right with any.
    """
    with contextlib.suppress(OSError), open("/proc/sys/net/ipv4/tcp_congestion_control", "w") as f:
        f.write("cubic")
