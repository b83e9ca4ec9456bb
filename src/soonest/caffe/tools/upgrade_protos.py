"""``upgrade_net_proto_text``, ``upgrade_net_proto_binary`` and ``upgrade_solver_proto_text``."""

from __future__ import annotations

from collections.abc import Callable

from soonest.caffe.files import mapped, read_bytes, replaced
from soonest.caffe.io import upgrade
from soonest.caffe.io.log import Say
from soonest.caffe.io.weights import write_message
from soonest.caffe.proto import text, wire
from soonest.caffe.proto.message import Message


def net_text(source: str, target: str, *, say: Say) -> bool:
    """Brings the definition of a net to today's form.

    Returns:
        Whether all of it could be taken over; what could not was said.

    Raises:
        ValueError: it cannot be read or written.
    """
    old = text.parse(read_bytes(source, "the definition of a net"), "NetParameter", file=source)
    new, whole = _net(old, source, say)
    _write(target, text.write(new))
    say(f"Wrote upgraded NetParameter text proto to {target}")
    return whole


def net_binary(source: str, target: str, *, say: Say) -> bool:
    """Brings trained weights, with the definition in them, to today's form; see ``net_text``."""
    old = wire.decode(mapped(source, "trained weights"), "NetParameter", file=source)
    new, whole = _net(old, source, say)
    write_message(target, new)
    say(f"Wrote upgraded NetParameter binary proto to {target}")
    return whole


def solver_text(source: str, target: str, *, say: Say) -> bool:
    """Brings a solver to today's form; see ``net_text``."""
    old = text.parse(read_bytes(source, "a solver"), "SolverParameter", file=source)
    _write(target, text.write(_upgraded(upgrade.solver, old, source, say)))
    say(f"Wrote upgraded SolverParameter text proto to {target}")
    return True


def _net(old: Message, source: str, say: Say) -> tuple[Message, bool]:
    wrong: list[str] = []
    new = _upgraded(lambda net: upgrade.net(net, warn=wrong.append), old, source, say)
    for line in wrong:
        say(line)
    if wrong:
        say("Encountered error(s) while upgrading prototxt; see details above.")
    return new, not wrong


def _upgraded(to_new: Callable[[Message], Message], old: Message, source: str, say: Say) -> Message:
    try:
        new = to_new(old)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if new == old:
        say(f"File already in latest proto format: {source}")
    return new


def _write(path: str, source: str) -> None:
    with replaced(path) as new:
        new.write_text(source, encoding="utf-8")
