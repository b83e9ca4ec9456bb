import os
import signal

import pytest

from soonest.lab import Loopback
from soonest.lab.launch import run_ranks

ENDLESS = ["sh", "-c", "echo ready; sleep 1000 & wait"]

PARENT = """
import signal, sys
from soonest.lab import Loopback
signal.signal(signal.SIGINT, signal.default_int_handler)
Loopback(2).run(["sh", "-c", "echo ready; sleep 1000 & wait"])
"""


def run(script, *, ranks=2, **options):
    lines = []
    with Loopback(ranks) as loopback:
        code = loopback.run(
            ["sh", "-c", script], on_line=lambda *line: lines.append(line), **options
        )
    return code, lines


def test_every_rank_runs_and_its_lines_come_with_its_number():
    code, lines = run("echo one; echo two >&2; printf three", ranks=3)
    assert code == 0
    for rank in range(3):
        assert [text for number, text in lines if number == rank] == ["one", "two", "three"]


def test_lines_come_while_the_rank_runs():
    class SeenError(Exception):
        pass

    def on_line(rank, line):
        raise SeenError

    with Loopback(1) as loopback, pytest.raises(SeenError):
        loopback.run(ENDLESS, on_line=on_line)


def test_without_a_listener_lines_are_printed(capfd):
    Loopback(1).run(["echo", "hello"])
    assert capfd.readouterr().out == "[0] hello\n"


def test_bytes_that_are_no_text_do_no_harm():
    assert run(r"printf '\377\n'", ranks=1) == (0, [(0, "�")])


def test_much_output_arrives_whole():
    code, lines = run("i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done", ranks=1)
    assert code == 0
    assert [int(text) for _, text in lines] == list(range(20000))


def test_the_variables_are_those_of_torchrun():
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR"
    _, lines = run(f"for name in {names}; do eval echo \\$$name; done")
    assert [text for rank, text in lines if rank == 1] == ["1", "2", "1", "2", "0", "127.0.0.1"]


def test_env_is_added_to_that_of_this_process(monkeypatch):
    monkeypatch.setenv("SOONEST_TEST_OUTER", "outer")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    script = "echo $SOONEST_TEST_OUTER $SOONEST_TEST_INNER $OMP_NUM_THREADS"
    _, lines = run(script, ranks=1, env={"SOONEST_TEST_INNER": "inner"})
    assert lines == [(0, "outer inner 3")]


@pytest.mark.parametrize(("how", "code"), [("exit 3", 3), ("kill -SEGV $$", 128 + signal.SIGSEGV)])
def test_a_failing_rank_ends_the_others(marked, how, code):
    script = f"if [ $RANK = 1 ]; then {how}; fi; sleep 1000 & wait"
    assert run(script, ranks=3, env=marked.env)[0] == code
    assert marked.all_ended()


def test_a_rank_that_ignores_the_request_to_end_is_killed(marked, monkeypatch):
    monkeypatch.setitem(run_ranks.__kwdefaults__, "grace_s", 0.3)
    script = "trap '' TERM; echo ready; while true; do sleep 0.1; done"
    with pytest.raises(TimeoutError):
        run(script, env=marked.env, timeout_s=1)
    assert marked.all_ended()


def test_a_rank_may_say_goodbye_when_it_is_ended():
    script = (
        "if [ $RANK = 1 ]; then sleep 1; exit 4; fi; trap 'echo bye; exit' TERM; sleep 1000 & wait"
    )
    assert run(script) == (4, [(0, "bye")])


def test_what_a_rank_started_ends_with_it(marked):
    assert run("sleep 1000 & exit 0", env=marked.env)[0] == 0
    assert marked.all_ended()


def test_timeout_ends_all(marked):
    with pytest.raises(TimeoutError, match=r"within 0\.5 s"):
        run("sleep 1000 & wait", env=marked.env, timeout_s=0.5)
    assert marked.all_ended()


def test_an_unknown_command_is_named():
    with pytest.raises(ValueError, match="no command 'no-such-program' here"):
        Loopback(2).run(["no-such-program"])
    with pytest.raises(ValueError, match="no command"):
        Loopback(2).run([])


def test_at_least_one_rank():
    with pytest.raises(ValueError, match="at least one"):
        Loopback(0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_parent(marked, number):
    with marked.start(PARENT) as parent:
        assert sorted(parent.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
        parent.send_signal(number)
        assert parent.wait() == -number
    assert marked.all_ended()


def signalled(script, *numbers, passed_on=(signal.SIGINT, signal.SIGHUP), **options):
    """Runs it, and sends this process one signal more each time that both ranks said a word."""
    lines, rest = [], list(numbers)

    def on_line(rank, line):
        lines.append((rank, line))
        if len(lines) % 2 == 0 and rest:
            os.kill(os.getpid(), rest.pop(0))

    with Loopback(2) as loopback:
        # The shell would tell of what it ran and the signal ended.
        command = ["sh", "-c", f"exec 2>/dev/null; {script}"]
        return loopback.run(command, on_line=on_line, passed_on=passed_on, **options), lines


def test_signals_are_passed_on_to_all_ranks_and_do_not_end_them():
    trap = "trap 'echo hung' HUP; trap 'echo bye; exit 0' INT"
    before = signal.getsignal(signal.SIGINT)
    code, lines = signalled(
        f"{trap}; echo ready; while true; do sleep 0.1; done", signal.SIGHUP, signal.SIGINT
    )
    assert code == 0
    for rank in range(2):
        assert [line for number, line in lines if number == rank] == ["ready", "hung", "bye"]
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("trap", "numbers"),
    [("echo bye; exit 3", [signal.SIGINT]), ("echo no", [signal.SIGINT, signal.SIGINT])],
)
def test_ranks_that_fail_on_an_interrupt_or_do_not_heed_it_are_ended(marked, trap, numbers):
    script = f"trap '{trap}' INT; echo ready; while true; do sleep 0.1; done"
    with pytest.raises(KeyboardInterrupt):
        signalled(script, *numbers, env=marked.env)
    assert marked.all_ended()
