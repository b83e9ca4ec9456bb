"""No wait without an end: every place in the runtime that may wait, and what limits it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

RUNTIME = Path(__file__).parents[3] / "src" / "soonest" / "runtime"
_WAITS = {"wait", "join", "result", "acquire", "get", "drain", "synchronize", "barrier", "sleep"}
_NO_LIMIT_NEEDED = {"get": 1, "join": 1}
"""By argument these are no waits: ``dict.get(key)``, ``str.join(parts)``."""

_GROUP = "the group's own time-out, after which the backend raises"
_LANE = "``check`` after each look, and the lane's time-out without progress"
_DEVICE = "lets a stream wait, not the host"
LIMITS = {
    "tuning.op_times._finish running.work.wait": _GROUP,
    "comm.messages.wait self._work.wait": _GROUP,
    "comm.objects.result self._work.wait": "has ended already",
    "comm.waiting.ended work.wait": "a look of half a second, or what has ended already",
    "comm.waiting.look _look.get": "a variable",
    "comm.waiting.finish work.wait": _DEVICE,
    "tuning.op_times.now_s torch.accelerator.synchronize": "the backend's watchdog",
    "ddp.reducer._set_forward_pass_work_handle work.wait": _GROUP,
    "ddp.reducer._set_forward_pass_work_handle work.result": "has ended already",
    "engine.module_buffers._wait part.work.wait": _DEVICE,
    "device.streams.seconds first.synchronize": "an event that is over",
    "device.streams.seconds last.synchronize": "an event that is over",
    "execute.watchdog.drain time.sleep": "``look``, which raises after the time-out",
    "engine.ending._end_threads time.sleep": "that long",
    "ddp.comm_hook._answer answer.wait": "the collective of the user's hook behind it",
    "ddp.unused_parameters.ended future.wait": "what the user has put there",
    "comm.rendezvous.wait time.sleep": "the group's time-out",
    "timing.lateness._take_what_has_come self._under_way[0][1].result": (
        "is None while it is under way"
    ),
    "engine.in_flight._wait self.lane.wait": _LANE,
    "engine.partial_grads.complete in_flight.lane.wait": _LANE,
    "comm.notes.wait_for_readers time.sleep": "the deadline of ``wait_for_notes``",
    "comm.failures._missing time.sleep": "its deadline",
    "execute.stream_lane._enqueue_ops self._streams.wait": _DEVICE,
    "execute.stream_lane._run_op running.work.wait": _DEVICE,
    "execute.stream_order.spread self._streams.wait": _DEVICE,
    "execute.stream_order.follow self._streams.wait": _DEVICE,
    "execute.stream_order.follow_user self._streams.wait": _DEVICE,
    "execute.stream_lane._drain self._enqueued.drain": "its limit, or the time-out",
    "execute.thread_lane._start_ops self._news.get": (
        "``close`` and ``fail``, which put an end there"
    ),
    "execute.thread_lane._end_ops self._running.get": (
        "``close`` and ``fail``, which put an end there"
    ),
}
"""By place, what ends a wait that is not given a time-out right there."""


def waits() -> Iterator[str]:
    for path in sorted(RUNTIME.rglob("*.py")):
        module = ".".join(path.relative_to(RUNTIME).with_suffix("").parts)
        yield from _inside(ast.parse(path.read_text(encoding="utf-8")), module, "")


def _inside(node: ast.AST, module: str, function: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, ast.FunctionDef) else function
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute):
            name, given = child.func.attr, len(child.args) + len(child.keywords)
            timed = any(k.arg in ("timeout", "timeout_s", "limit_s") for k in child.keywords)
            harmless = given >= _NO_LIMIT_NEEDED.get(name, 10**9)
            if name in _WAITS and not timed and not harmless and not _gives_time(child):
                yield f"{module}.{inner} {ast.unparse(child.func)}"
        yield from _inside(child, module, inner)


def _gives_time(call: ast.Call) -> bool:
    """``condition.wait(LOOK_S)`` and the like."""
    text = " ".join(ast.unparse(argument) for argument in call.args)
    return call.func.attr == "wait" and ("_S" in text or "timedelta" in text)  # type: ignore[attr-defined]


def test_every_wait_has_a_limit() -> None:
    unknown = [found for found in waits() if found not in LIMITS]
    assert unknown == [], "say in LIMITS what ends these, and make sure that it does"


def test_the_list_of_waits_names_none_that_is_gone() -> None:
    assert sorted(set(LIMITS) - set(waits())) == []
