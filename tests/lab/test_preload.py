"""A rank that is forked from the nursery cannot be told from a fresh interpreter."""

import os
import signal
import sys
from pathlib import Path

import pytest

from soonest.lab import Loopback
from soonest.lab.preload import should_preload
from soonest.lab.rank import Rank

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="preloading needs Linux")

ABOUT = """
import os, sys, threading
print(__name__, __file__, __doc__, __package__, __annotations__)
print(__spec__ and __spec__.name, type(__loader__))
print(sys.argv, sys.orig_argv, sys.path, sys.executable, sys.flags, sys.warnoptions)
print(sorted(globals()), sys.modules["__main__"].__dict__ is globals())
print(os.environ["RANK"], os.environ["COMMON"], os.getcwd(), sys.stdin.read() == "")
print(os.getpgid(0) == os.getpid(), sorted(map(int, os.listdir("/proc/self/fd"))))
print(threading.current_thread() is threading.main_thread(), threading.active_count())
print(sys.stdout.isatty(), sys.stdout.line_buffering, sys.excepthook is sys.__excepthook__)
import neighbour
"""

SCRIPTS = {
    "about": ABOUT,
    "text": "import sys\nprint('out')\nsys.exit('a reason')",
    "code": "raise SystemExit(3)",
    "large_code": "raise SystemExit(256 + 5)",
    "negative": "raise SystemExit(-1)",
    "no_output": "import sys\nsys.stdout.close()\nsys.stdout = None",
    "closed_output": "import sys\nprint(1)\nsys.stdout.close()",
    "none": "import sys\nsys.exit()",
    "error": (
        "def f():\n    raise ValueError('why')\n\ntry:\n    f()\nexcept ValueError:\n    1 / 0"
    ),
    "syntax": "print('never')\nif:\n",
    "interrupt": "raise KeyboardInterrupt",
    "signal": "import os\nos.kill(os.getpid(), 11)",
    "at_once": "import os\nprint('lost', end='')\nos._exit(7)",
    "unflushed": "import sys\nsys.stdout.write('no line end')\nsys.stderr.write('nor here')",
    "handlers": "import atexit\natexit.register(print, 'bye')\natexit.register(print, 'good')",
    "hook": "import sys\nsys.excepthook = lambda *e: print('hook', repr(e[1]))\nraise ValueError",
    "thread": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print(__name__))).start()\nprint(1)"
    ),
    "destroyed": "class A:\n    def __del__(self): print('gone')\na = A()\na.self = a",
    "not_closed": (
        "import subprocess, sys\nf = open('written', 'w')\nf.write('kept')\n"
        "if len(sys.argv) == 1:\n"
        "    subprocess.run([sys.executable, *sys.orig_argv[1:], 'again'])\n"
        "    print(open('written').read())"
    ),
    "pickle": (
        "import pickle\nclass A: pass\nif __name__ == '__main__':\n"
        "    print(type(pickle.loads(pickle.dumps(A()))) is A)"
    ),
    "pool": (
        "import multiprocessing\ndef f(x): return x + 1\nif __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.map(f, [1]))"
    ),
    "closed": "import os, sys\nprint('x')\nos.close(1)",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with the scripts, where importing torch fails at once, to save time."""
    without = tmp_path / "without"
    (without / "torch").mkdir(parents=True)
    (without / "torch" / "__init__.py").write_text("raise ImportError")
    scripts = tmp_path / "scripts"
    (scripts / "package").mkdir(parents=True)
    (scripts / "package" / "__main__.py").write_text(ABOUT)
    (scripts / "neighbour.py").write_text("print(__file__)")
    for name, script in SCRIPTS.items():
        (scripts / f"try_{name}.py").write_text(script)
    monkeypatch.chdir(scripts)
    monkeypatch.setenv("PYTHONPATH", str(without))
    return tmp_path


def run(args, *, preload, ranks=1, **env):
    lines = []
    code = Loopback(ranks).run(
        [sys.executable, *args],
        env={"COMMON": "common", **env},
        preload=preload,
        on_line=lambda _, line: lines.append(line),
        timeout_s=60,
    )
    return code, lines


def same(args, **env):
    fresh = run(args, preload=False, **env)
    assert run(args, preload=True, **env) == fresh
    return fresh


CODES = {
    "text": 1, "code": 3, "large_code": 5, "negative": 255, "at_once": 7,
    "error": 1, "syntax": 1, "hook": 1,
    "interrupt": 128 + signal.SIGINT, "signal": 128 + signal.SIGSEGV,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - {"closed"}))
def test_a_script_ends_as_it_would(place, name):
    code, lines = same([f"try_{name}.py"], PYTHONUNBUFFERED="")
    assert code == CODES.get(name, 0), lines


def test_a_closed_output_is_an_error(place):
    assert run(["try_closed.py"], preload=True, PYTHONUNBUFFERED="") == (120, [])


@pytest.mark.parametrize(
    "args",
    [
        ["try_about.py", "-x", "--", "y"],
        ["./../scripts/try_about.py"],
        ["-m", "try_about", "-m", "x"],
        ["-m", "package", "x"],
        ["-m", "no_such_module"],
        ["-m", "try_error"],
        ["-c", "import sys; print(sys.argv, sys.path, sorted(globals()), __spec__)", "-c", "x"],
        ["-c", "1 / 0"],
        ["-c", "if:"],
    ],
)
def test_a_command_sees_what_it_would(place, args):
    same(args)


def test_a_script_elsewhere_and_a_link_to_it(place, monkeypatch):
    (place / "linked.py").symlink_to("scripts/try_about.py")
    monkeypatch.chdir(place)
    assert same(["scripts/try_about.py"])[0] == 0
    assert same(["linked.py"])[0] == 0


def test_a_path_that_is_safe_stays_so(place):
    assert same(["try_about.py"], PYTHONSAFEPATH="1")[0] == 1  # It cannot import its neighbour.


REAL = """
import os, sys
print("torch" in sys.modules)
import numpy, torch
print(float(numpy.random.random()), float(torch.rand(1)), os.environ["OMP_NUM_THREADS"])
print(torch.get_num_threads())
with open("/proc/self/smaps_rollup") as rollup:
    print(sum(int(line.split()[1]) for line in rollup if line.startswith("Private")) // 1000)
"""


def test_torch_is_imported_once_and_ranks_draw_different_numbers(tmp_path):
    lines = [[] for _ in range(3)]
    code = Loopback(3).run(
        [sys.executable, "-c", REAL],
        env={"OMP_NUM_THREADS": "2"},
        preload=True,
        on_line=lambda rank, line: lines[rank].append(line),
    )
    assert code == 0, lines
    assert [rank[0] for rank in lines] == ["True"] * 3
    assert [rank[2] for rank in lines] == ["2"] * 3
    numbers = [number for rank in lines for number in rank[1].split()[:2]]
    assert len(set(numbers)) == 6
    assert max(int(rank[3]) for rank in lines) < 60  # MB of its own; 230 alone


def test_it_is_the_default_for_many_ranks_of_this_python(place, monkeypatch):
    script, python = "try_about.py", sys.executable

    def default(command, ranks=8, **env):
        rank = Rank({"PATH": os.path.dirname(python), **env})
        return should_preload(None, command, [rank] * ranks)

    assert default([python, script])
    assert default([python, "-m", "package"])
    assert default([python, "-c", ""])
    assert default([os.path.basename(python), script, "-x"])
    assert not default([python, script], ranks=7)
    assert not default([python])
    assert not default([python, "-m"])
    assert not default([python, "-u", script])
    assert not default([python, "no_such.py"])
    assert not default([python, "package"])
    assert not default(["/bin/sh", script])
    (place / "bin").mkdir()
    (place / "bin" / "python").symlink_to(Path(python).resolve())
    assert not default([str(place / "bin" / "python"), script])


@pytest.mark.parametrize("command", [["true"], [sys.executable, "-u", "-c", ""]])
def test_what_cannot_be_preloaded_is_refused(command):
    with pytest.raises(ValueError, match="leave preload out"):
        Loopback(2).run(command, preload=True)


WAIT = """
import os, subprocess, sys, time
if os.environ["RANK"] == "0" and sys.argv[1:]:
    time.sleep(1)
    sys.exit(4)
print("ready", flush=True)
subprocess.run(["sleep", "1000"])
"""

PARENT = f"""
import signal, sys
from soonest.lab import Loopback
signal.signal(signal.SIGINT, signal.default_int_handler)
Loopback(2).run([sys.executable, "-c", {WAIT!r}], preload=True)
"""


def test_a_failing_rank_ends_the_others(place, marked):
    code, lines = run(["-c", WAIT, "x"], preload=True, ranks=3, **marked.env)
    assert (code, lines) == (4, ["ready"] * 2)
    assert marked.all_ended()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_parent(place, marked, number):
    with marked.start(PARENT) as parent:
        assert sorted(parent.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
        parent.send_signal(number)
        assert parent.wait() == -number
    assert marked.all_ended()


def test_a_parent_that_ends_while_torch_is_imported_leaves_nothing(marked):
    with marked.start(PARENT) as parent:
        assert marked.eventually(lambda: len(marked.alive()) >= 3)
        parent.send_signal(signal.SIGINT)
        parent.wait()
    assert marked.all_ended()
