"""What is missing is named, all of it, and each with its remedy."""

import ctypes
import errno
import os
import shutil
import sys

import pytest

from soonest.cli import main
from soonest.lab import Lab, requirements, unavailable
from soonest.lab.requirements import problems

WHY_NOT = unavailable()
needs_lab = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

which = shutil.which


@pytest.fixture
def without(monkeypatch):
    """Makes programs, the right to make namespaces, or features of the kernel unavailable."""

    def take_away(*things):
        programs = {"ip", "tc", "nsenter", "setpriv"}
        monkeypatch.setattr(
            "shutil.which",
            lambda name, **more: (
                None if name in things else f"/bin/{name}" if name in programs else which(name)
            ),
        )
        if "root" in things:

            def refuse(_):
                ctypes.set_errno(errno.EPERM)
                return -1

            monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: type("", (), {"unshare": refuse}))
        else:
            monkeypatch.setattr(
                requirements, "make_namespaces", lambda _: [os.open(os.devnull, os.O_RDONLY)]
            )

        def configure(namespace, tool, lines):
            if set(things) & {"veth", "bridge", "tbf"} & set(lines[0].split()):
                raise RuntimeError("Operation not supported")

        monkeypatch.setattr(requirements, "configure", configure)

    return take_away


CASES = [
    (["ip"], ["needs ip"], ["package iproute2"]),
    (["tc"], ["needs tc"], ["package iproute2"]),
    (["nsenter"], ["needs nsenter"], ["package util-linux"]),
    (["setpriv"], ["needs setpriv"], ["package util-linux"]),
    (["root"], ["may not make network namespaces"], ["run as root"]),
    (["veth"], ["kernel with veth"], ["modprobe veth"]),
    (["bridge"], ["kernel with bridge"], ["modprobe bridge"]),
    (["tbf"], ["kernel with sch_tbf"], ["modprobe sch_tbf"]),
    (
        ["tc", "setpriv", "root"],
        ["needs tc", "needs setpriv", "may not make"],
        ["iproute2", "util-linux", "run as root"],
    ),
    (["bridge", "tbf", "setpriv"], ["setpriv", "bridge", "sch_tbf"], ["util-linux", "", ""]),
]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems lack Linux before all else")
@pytest.mark.parametrize(("things", "named", "remedies"), CASES)
def test_all_that_is_missing_is_said_with_its_remedy(without, capfd, things, named, remedies):
    without(*things)
    assert main(["lab", "check"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == len(named)
    for line, name, remedy in zip(lines, named, remedies, strict=True):
        assert line.startswith("soonest: the lab ")
        assert name in line
        assert remedy in line
    assert unavailable() == lines[0].removeprefix("soonest: ")


def test_another_system_is_all_that_is_said(monkeypatch, capfd):
    monkeypatch.setattr("sys.platform", "darwin")
    assert main(["lab", "check"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "needs Linux and this is darwin: use a virtual machine" in err
    with pytest.raises(RuntimeError, match="needs Linux"), Lab(hosts=1, link_bps=1e9):
        pass


@needs_lab
def test_a_feature_that_the_kernel_lacks_is_found(monkeypatch):
    features = {"no_such_module": ("ip", "link add one type no_such_type")}
    monkeypatch.setattr(requirements, "_FEATURES", features)
    [problem] = problems()
    assert "modprobe no_such_module" in problem
