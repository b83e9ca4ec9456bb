"""Flags as Caffe's programs take them: one dash or two, before the command or behind it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from soonest.cli.request import WrongRequestError

_TRUE, _FALSE = ("1", "t", "true", "y", "yes"), ("0", "f", "false", "n", "no")
_UNUSED = (
    "colorlogtostderr", "drop_log_memory", "log_prefix", "stop_logging_if_full_disk",
    "symbolize_stacktrace", "log_backtrace_at", "log_link", "logbuflevel", "logbufsecs",
    "logemaillevel", "logmailer", "max_log_size", "v", "vmodule",
)  # fmt: skip
_SWITCHES = _UNUSED[:5]


def truth(text: str) -> bool:
    """A type for ``add_argument``: a flag that is on or off.

    Such a flag takes its value only behind ``=``, means yes without one, and no with ``no`` in
    front.
    """
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def add_logging(parser: argparse.ArgumentParser) -> None:
    """The flags of Google's logger. Those of its flags that change nothing here are taken, too."""
    group = parser.add_argument_group("logging")

    def add(name: str, default: Any, type_: Any, help_: str, **more: Any) -> None:
        default = os.environ.get(f"GLOG_{name}", default)
        group.add_argument(f"--{name}", default=default, type=type_, help=help_, **more)

    add("log_dir", "", str, "write log lines to files in this folder, too", metavar="FOLDER")
    add("minloglevel", "0", int, "say nothing below: 1 are warnings, 2 errors", metavar="N")
    add("logtostderr", "false", truth, "write no files", metavar="BOOL")
    add("alsologtostderr", "true", truth, "say everything on stderr (%(default)s)", metavar="BOOL")
    add("stderrthreshold", "2", int, "what else to say there from (%(default)s)", metavar="N")
    for name in _UNUSED:
        type_ = truth if name in _SWITCHES else str
        parser.add_argument(f"--{name}", type=type_, help=argparse.SUPPRESS)


def logger(args: argparse.Namespace) -> Any:
    """The logger that flags ask for."""
    from soonest.caffe.io.log import INFO, Logger

    everything = args.logtostderr or args.alsologtostderr
    folder = "" if args.logtostderr else args.log_dir
    if folder and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise WrongRequestError(f"no folder {folder!r} to write a log in: make it first")
    return Logger(INFO if everything else args.stderrthreshold, args.minloglevel, folder)


def spelled(words: Sequence[str], verbs: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """Words as argparse takes them: the command first, flags with two dashes and ``=``.

    Args:
        words: as they were written.
        verbs: the parser of each command, whose flags count.
    """
    flags = {
        option.removeprefix("--"): action
        for parser in verbs.values()
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    coming = list(words)
    found: list[str] = []
    while coming:
        word = coming.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if word == "--":
            return found + coming
        if not word.startswith("-") or not name:
            found.append(word)
            continue
        if name not in flags and name.startswith("no") and _is_switch(flags.get(name[2:])):
            found.append(f"--{name[2:]}=false")
        elif _is_switch(flags.get(name)):
            found.append(f"--{name}={value if equals else 'true'}")
        elif name in flags and flags[name].nargs != 0 and not equals and coming:
            found.append(f"--{name}={coming.pop(0)}")
        else:
            found.append(word if len(word) == 2 else f"--{name}{equals}{value}")
    verb = next((word for word in found if not word.startswith("-")), None)
    if verb is not None:
        found.remove(verb)
        found.insert(0, verb)
    return found


def _is_switch(action: argparse.Action | None) -> bool:
    return action is not None and action.type is truth
