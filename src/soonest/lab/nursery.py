"""Imports torch once and forks one process per rank, each of which then runs a Python command.

A program of its own, which ``preload.py`` starts: it must not import the package that it lies in,
as it may have to run where that cannot be imported. Its input is JSON: ``args``, what follows
``python`` on the command line, and ``ranks`` with ``env``, ``namespace`` and ``output`` of each.
Its output is the ranks' process ids, one a line, and then ``pid code`` for each that ended.

The commands must not notice: a rank becomes what a fresh interpreter would have made of it, and
ends as that would have ended.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import ctypes
import gc
import importlib
import importlib.machinery
import io
import json
import linecache
import os
import runpy
import signal
import sys
import threading
import types
from typing import Any, NoReturn

_PRELOADED = ("torch", "torch.distributed", "torch._dynamo", "soonest.runtime")
"""torch._dynamo is what the first optimizer imports."""

_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_UNFLUSHED = 120

_libc = ctypes.CDLL(None, use_errno=True)


def nurse() -> list[str] | None:
    """Starts the ranks and waits for their end; in each rank, returns what that should run."""
    with open(0, "rb", closefd=False) as request_file:
        request = json.load(request_file)
    # Whatever is printed while importing must not be taken for a report.
    report = os.dup(1)
    os.dup2(2, 1)
    _set_path(request["args"])
    for name in _PRELOADED:
        # The ranks will find out themselves, if they need it.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    sys.stdout.flush()
    gc.collect()
    # Else the first collection would write to, and so copy, every page that the ranks share.
    gc.freeze()
    nursery = os.getpid()
    outputs = [rank["output"] for rank in request["ranks"]]
    for rank in request["ranks"]:
        pid = os.fork()
        if pid == 0:
            os.close(report)
            _become(rank, nursery)
            for output in outputs:
                os.close(output)
            return request["args"]
        os.close(outputs.pop(0))
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)
        os.write(report, f"{pid}\n".encode())
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.wait()
            os.write(report, f"{pid} {os.waitstatus_to_exitcode(status)}\n".encode())
    return None


def _set_path(args: list[str]) -> None:
    """Replaces this file's folder on the path by what the command expects in its place."""
    if sys.flags.safe_path:
        return
    script = os.path.dirname(os.path.realpath(args[0]))
    sys.path[0] = {"-c": "", "-m": os.getcwd()}.get(args[0], script)


def _become(rank: dict[str, Any], nursery: int) -> None:
    os.setpgid(0, 0)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != nursery:
        os.kill(os.getpid(), signal.SIGKILL)
    os.dup2(rank["output"], 1)
    os.dup2(rank["output"], 2)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    if rank["namespace"]:
        with open(rank["namespace"], "rb") as namespace:
            if _libc.setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot enter the host's network namespace")
    os.environ.update(rank["env"])
    # Fresh processes would draw different numbers.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def _run(args: list[str]) -> None:
    """Does what ``python`` does with these arguments."""
    main: Any = types.ModuleType("__main__")
    main.__builtins__ = builtins
    main.__annotations__ = {}
    main.__loader__ = importlib.machinery.BuiltinImporter
    sys.modules["__main__"] = main
    sys.orig_argv = [sys.executable, *args]
    first, *rest = args
    if first == "-m":
        sys.argv = args[:1] + rest[1:]
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
        return
    if first == "-c":
        sys.argv = args[:1] + rest[1:]
        source, name = rest[0], "<string>"
        if sys.version_info >= (3, 13):  # From where on tracebacks show its lines.
            linecache.cache[name] = len(source), None, source.splitlines(True), name
    else:
        sys.argv = args
        name = os.path.join(os.getcwd(), first)
        main.__file__ = name
        main.__cached__ = None
        main.__loader__ = importlib.machinery.SourceFileLoader("__main__", name)
        with io.open_code(name) as script:
            source = script.read()
    try:
        exec(compile(source, name, "exec", dont_inherit=True), vars(main))
    finally:
        for stream in (sys.stderr, sys.stdout):
            with contextlib.suppress(Exception):
                stream.flush()


def _code_of(error: BaseException) -> int:
    """Reports what a command ended with as the interpreter would have; returns its exit code."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)  # noqa: T201
        return 1
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)
    return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _leave(code: int, preloaded: set[str]) -> NoReturn:
    """Ends the process as the interpreter does, but for taking apart what was preloaded.

    That would take longer than all the rest, and memory for a copy of everything shared.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    atexit._clear()
    if threading.active_count() == 1:
        # What the command made is taken apart: files are closed, finalizers run.
        sys.excepthook = sys.__excepthook__
        for name in sys.modules.keys() - preloaded | {"__main__"}:
            del sys.modules[name]
        gc.collect()
    try:
        if sys.stdout and not sys.stdout.closed:
            sys.stdout.flush()
    except Exception:
        code = code or _UNFLUSHED
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    _libc.fflush(None)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _live(args: list[str]) -> NoReturn:
    preloaded = set(sys.modules)
    code = 0
    try:
        _run(args)
    except BaseException as error:
        code = _code_of(error)
    _leave(code, preloaded)


if __name__ == "__main__":
    _nursery = sys.modules["__main__"]  # Its names are needed after another takes that place.
    if (_args := nurse()) is not None:
        _live(_args)
