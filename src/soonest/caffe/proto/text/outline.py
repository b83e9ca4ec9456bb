"""The marks of a text: whether all can be read, and where every message in it starts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MOST_NESTED = 100
"""Messages within messages, as in protobuf."""
MOST_VALUES = 1_000_000
"""Messages and strings. No net has as many; a hostile text could fill memory with them."""

_TOKEN = re.compile(
    r"""(?P<space>(?:[ \t\r\n\f\v]+|\#[^\n]*)+)
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<number>(?:0[xX][0-9A-Fa-f]+|(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[fF]?))
        (?![A-Za-z0-9_.])
      | (?P<string>"(?:[^"\\\n]|\\[^\n])*"|'(?:[^'\\\n]|\\[^\n])*')
      | (?P<mark>[{}<>\[\]:;,\-])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(
    r"""\\(?:[abfnrtv\\'"?]|[0-3]?[0-7]{1,2}(?![0-7])|[0-3][0-7]{2}|[xX][0-9a-fA-F]{1,2}
        |u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|U(?:000[0-9a-fA-F]|0010)[0-9a-fA-F]{4})
      | (?P<wrong>\\(?:[0-7]+|[uUxX][0-9a-fA-F]*|.))""",
    re.VERBOSE | re.DOTALL,
)
_BYTE_ORDER = "\ufeff\udcff\udcfe"
"""Marks of UTF-8 and UTF-16, the latter as bytes that are no UTF-8."""
_CLOSES = {"{": "}", "<": ">"}


class UnreadableError(ValueError):
    """What no text may have in it, and at which character."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__(what)
        self.at = at


@dataclass
class Outline:
    """A message in a text.

    Attributes:
        at: at which character it starts.
        closes: the mark that must end it.
        within: those in it, by the name of their field.
    """

    at: int
    closes: str = ""
    within: dict[str, list[Outline]] = field(default_factory=dict)


def outline(text: str) -> tuple[Outline, Outline | None]:
    """The message that a text is, and the innermost one that it does not close, if there is one.

    Raises:
        UnreadableError: it has what is no name, number, string or mark, or an end without a start.
    """
    root = here = Outline(0)
    above: list[tuple[Outline, str]] = []
    name = ""
    values = stop = 0
    while stop < len(text):
        match = _TOKEN.match(text, stop)
        if match is None:
            raise UnreadableError(stop, _unreadable(text[stop : stop + 30]))
        start, stop = match.span()
        token = match[0]
        if match.lastgroup == "name":
            name = token
        elif match.lastgroup == "string":
            values += 1
            _check_escapes(token, start)
        elif token in _CLOSES:
            values += 1
            if len(above) == MOST_NESTED:
                raise UnreadableError(start, f"more than {MOST_NESTED} messages within each other")
            inner = Outline(start, _CLOSES[token])
            here.within.setdefault(name, []).append(inner)
            above.append((here, name))
            here = inner
        elif token in ("}", ">"):
            if token != here.closes:
                raise UnreadableError(start, _closes_nothing(token, here))
            here, name = above.pop()
        if values > MOST_VALUES:
            raise UnreadableError(start, f"more than {MOST_VALUES} values")
    return root, here if above else None


def _closes_nothing(token: str, here: Outline) -> str:
    if not here.closes:
        return f"{token!r} closes nothing: take it out, or open it"
    return f"{token!r} closes what does not start so: expected {here.closes!r}"


def _unreadable(rest: str) -> str:
    if rest[0] in "\"'":
        return "this string does not end in its line: close it, or escape the line break"
    if rest[0] in _BYTE_ORDER:
        return "the file begins with a byte order mark: save it as UTF-8 without one"
    word = re.match(r"[A-Za-z0-9_.]+|.", rest, re.DOTALL)
    return f"cannot read {word[0] if word else rest!r}: it is no name, number or mark"


def _check_escapes(token: str, start: int) -> None:
    if "\\" not in token:
        return
    for match in _ESCAPE.finditer(token):
        if match["wrong"]:
            raise UnreadableError(
                start,
                f"no escape {match['wrong']} exists: write / or \\\\ in paths",
            )
