import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from soonest.lab import Lab, unavailable
from soonest.lab.registry import running_labs

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

# Rank 1 sends as fast as it can; rank 0 says every 0.2 s how many bits per second arrived.
TRANSFER = """
import os, socket, time
address = os.environ["MASTER_ADDR"], 5000
if os.environ["RANK"] == "0":
    connection = socket.create_server(address).accept()[0]
    connection.settimeout(0.02)
    buffer = bytearray(1 << 20)
    received, since = 0, time.perf_counter()
    while True:
        try:
            received += connection.recv_into(buffer)
        except TimeoutError:
            pass
        now = time.perf_counter()
        if now - since > 0.2:
            print(received * 8 / (now - since))
            received, since = 0, now
else:
    while True:
        try:
            connection = socket.create_connection(address)
            break
        except OSError:
            time.sleep(0.05)
    try:
        while True:
            connection.send(bytes(1 << 18))
    except OSError:
        pass  # Rank 0 was ended a moment before this one.
"""

# Rank 1 prints what rank 0 has in MARK.
SERVE = """
import os, socket, time
address = os.environ["MASTER_ADDR"], 5000
if os.environ["RANK"] == "0":
    socket.create_server(address).accept()[0].sendall(os.environ["MARK"].encode())
else:
    while True:
        try:
            print(socket.create_connection(address).recv(100).decode())
            break
        except OSError:
            time.sleep(0.05)
"""

PARENT = """
import glob, os, signal, sys
from soonest.lab import Lab
signal.signal(signal.SIGINT, signal.default_int_handler)
with Lab(hosts=2, link_bps=1e9) as lab:
    files = [os.path.realpath(path) for path in glob.glob("/proc/self/fd/*")]
    print(*[os.path.basename(file) for file in files if "net:[" in file], flush=True)
    lab.run(["sh", "-c", "echo ready; sleep 1000 & wait"])
"""


class EnoughError(Exception):
    pass


def transfer(lab, on_rate):
    """Calls ``on_rate`` with the rate of every 0.2 s of a transfer, until it raises EnoughError."""
    with pytest.raises(EnoughError):
        lab.run(
            [sys.executable, "-S", "-c", TRANSFER],
            on_line=lambda rank, line: on_rate(float(line)),
            timeout_s=120,
        )


def holders(namespaces):
    """Processes that are in one of the namespaces or have it open."""
    found = set()
    for pattern in ("[0-9]*/task/*/ns/net", "[0-9]*/fd/*"):
        for path in Path("/proc").glob(pattern):
            try:
                if os.readlink(path) in namespaces:
                    found.add(int(path.parts[2]))
            except OSError:
                continue
    return found


def links():
    return subprocess.run(["ip", "-o", "link"], capture_output=True, check=True).stdout


def test_every_host_sees_the_others_and_nothing_else():
    lines = {}
    with Lab(hosts=3, link_bps=1e9) as lab:
        script = "ip -br addr; echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR"
        on_line = lambda rank, line: lines.setdefault(rank, []).append(line)  # noqa: E731
        assert lab.run(["sh", "-c", script], on_line=on_line) == 0
        assert [lab.address(host) for host in range(3)] == ["10.77.0.1", "10.77.0.2", "10.77.0.3"]
    for rank in range(3):
        lo, eth, variables = lines[rank]
        assert lo.split()[0] == "lo"
        assert eth.startswith("eth0@")
        assert f"10.77.0.{rank + 1}/16" in eth
        assert variables == f"{rank} 3 0 1 10.77.0.1"


def test_many_hosts_have_addresses_of_their_own():
    lab = Lab(hosts=600, link_bps=1e9)
    assert len({lab.address(host) for host in range(600)}) == 600
    assert lab.address(255) == "10.77.1.0"


def test_runs_follow_one_another_and_return_the_code():
    with Lab(hosts=2, link_bps=1e9) as lab:
        assert [lab.run(["sh", "-c", "exit $((RANK * 3))"]), lab.run(["true"])] == [3, 0]


@pytest.mark.parametrize("asked_bps", [20e6, 300e6])
def test_a_link_carries_what_was_asked(asked_bps):
    rates = []

    def on_rate(rate):
        rates.append(rate)
        if len(rates) == 10:
            raise EnoughError

    with Lab(hosts=2, link_bps=asked_bps) as lab:
        transfer(lab, on_rate)
    # Headers take 4.4 percent; the first moments fill the burst and the queue.
    assert 0.8 < statistics.mean(rates[3:]) / asked_bps < 1.02


@pytest.mark.parametrize(
    ("uplinks_bps", "carried_bps"), [(20e6, 20e6), ([100e6, 20e6], 20e6), ([20e6, 100e6], 100e6)]
)
def test_a_host_sends_at_the_rate_of_its_uplink(uplinks_bps, carried_bps):
    rates = []

    def on_rate(rate):
        rates.append(rate)
        if len(rates) == 8:
            raise EnoughError

    with Lab(hosts=2, link_bps=100e6, uplink_bps=uplinks_bps) as lab:
        transfer(lab, on_rate)
    assert 0.6 < statistics.median(rates[2:]) / carried_bps < 1.3


def test_the_rate_can_change_during_a_transfer():
    rates = []

    def on_rate(rate):
        rates.append(rate)
        if len(rates) == 6:
            lab.set_link(1, 25e6)
        if len(rates) == 18:
            raise EnoughError

    with Lab(hosts=2, link_bps=100e6) as lab:
        transfer(lab, on_rate)
    assert 2.5 < statistics.median(rates[2:6]) / statistics.median(rates[-6:]) < 6


def test_a_cut_link_carries_nothing_until_it_is_mended():
    rates = []
    mended = False

    def on_rate(rate):
        nonlocal mended
        rates.append(rate)
        if len(rates) == 5:
            lab.cut(0)
        if not mended and len(rates) > 5 and rates[-3:] == [0, 0, 0]:
            lab.mend(0)
            mended = True
        if mended and rate > 0:
            raise EnoughError

    with Lab(hosts=2, link_bps=100e6) as lab:
        transfer(lab, on_rate)
    assert min(rates[1:5]) > 0


def test_two_labs_side_by_side_do_not_meet():
    heard = []

    def in_one(lab, mark, then=lambda: None):
        def on_line(rank, line):
            heard.append((mark, line))
            then()

        command = [sys.executable, "-S", "-c", SERVE]
        assert lab.run(command, env={"MARK": mark}, on_line=on_line, timeout_s=60) == 0

    with Lab(hosts=2, link_bps=1e9) as one, Lab(hosts=2, link_bps=1e9) as other:
        in_one(one, "one", then=lambda: in_one(other, "other"))
    assert sorted(heard) == [("one", "one"), ("other", "other")]


def test_a_lab_that_ends_does_not_disturb_another():
    rates = []

    def on_rate(rate):
        rates.append(rate)
        if len(rates) == 5:
            other.__exit__()
            with Lab(hosts=2, link_bps=1e9) as third:
                third.run(["true"])
        if len(rates) == 10:
            raise EnoughError

    with Lab(hosts=2, link_bps=20e6) as one:
        other = Lab(hosts=2, link_bps=20e6).__enter__()
        transfer(one, on_rate)
        assert one.run(["true"]) == 0
    assert min(rates[6:]) > 0.5 * statistics.median(rates[2:5])


def command_line(*words):
    """Runs ``soonest lab link`` on the lab of this process, in another."""
    mine = [other.id for other in running_labs() if other.pid == os.getpid()]
    assert len(mine) == 1
    command = [sys.executable, "-m", "soonest", "lab", "link", "--lab", str(mine[0]), *words]
    subprocess.run(command, check=True, timeout=60)


def test_another_process_changes_cuts_and_mends_a_link_during_a_transfer():
    rates, marks = [], {}

    def on_rate(rate):
        rates.append(rate)
        count = len(rates)
        if count == 6:
            command_line("--host", "1", "--rate", "25mbit")
        elif count == 20:
            command_line("--host", "0", "--down")
            marks["down"] = count
        elif "up" not in marks and count > 24 and rates[-3:] == [0, 0, 0]:
            command_line("--host", "0", "--up")
            marks["up"] = count
        elif "up" in marks and rate > 0 and count > marks["up"] + 1:
            raise EnoughError

    with Lab(hosts=2, link_bps=100e6) as lab:
        transfer(lab, on_rate)
    assert 2.5 < statistics.median(rates[2:6]) / statistics.median(rates[14:20]) < 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_parent(marked, number):
    before = links()
    with marked.start(PARENT) as parent:
        namespaces = set(parent.stdout.readline().split())
        assert sorted(parent.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
        assert len(namespaces) == 3
        assert len(holders(namespaces)) >= 3
        assert links() == before
        assert parent.pid in [lab.pid for lab in running_labs()]
        parent.send_signal(number)
        assert parent.wait() == -number
    assert marked.all_ended()
    assert marked.eventually(lambda: not holders(namespaces))
    assert parent.pid not in [lab.pid for lab in running_labs()]


def open_namespaces():
    """Files of network namespaces that this process has open."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(path))
        except OSError:
            continue
    return sorted(name for name in found if name.startswith("net:["))


def test_a_closed_lab_leaves_nothing_and_says_that_it_is_closed():
    before, files = links(), open_namespaces()
    for _ in range(3):
        with Lab(hosts=2, link_bps=1e9) as lab:
            assert len(open_namespaces()) == len(files) + 3
    assert links() == before
    assert open_namespaces() == files
    assert os.getpid() not in [other.pid for other in running_labs()]
    for use in (lambda: lab.run(["true"]), lambda: lab.cut(0)):
        with pytest.raises(RuntimeError, match="not open"):
            use()


@pytest.mark.parametrize(("hosts", "link_bps"), [(0, 1e9), (2000, 1e9), (2, 0), (2, float("nan"))])
def test_what_makes_no_sense_is_refused(hosts, link_bps):
    with pytest.raises(ValueError):
        Lab(hosts=hosts, link_bps=link_bps)


@pytest.mark.parametrize("uplink_bps", [0, [1e6], [1e6] * 3, [], [1e6, -1]])
def test_uplinks_that_make_no_sense_are_refused(uplink_bps):
    with pytest.raises(ValueError):
        Lab(hosts=2, link_bps=1e9, uplink_bps=uplink_bps)


def test_an_unknown_host_is_refused():
    with Lab(hosts=2, link_bps=1e9) as lab:
        for use in (lab.cut, lab.mend, lab.address, lambda host: lab.set_link(host, 1e6)):
            with pytest.raises(ValueError, match="hosts 0 to 1"):
                use(2)
