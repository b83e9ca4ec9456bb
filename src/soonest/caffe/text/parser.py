"""Reads messages from text: the format of ``.prototxt`` files.

The grammar is that of protobuf's text format:
https://protobuf.dev/reference/protobuf/textformat-spec/
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import NoReturn

from soonest.caffe.message import REAL, Message, to_float32
from soonest.caffe.schema import INTEGER_RANGE, MESSAGES, Field, MessageType

MOST_NESTED = 100
"""Messages within messages, as in protobuf."""
MOST_VALUES = 1_000_000
"""Besides numbers with a fraction. No net has as many; a hostile text could fill memory with
them."""

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
    rb"\\(?:([abfnrtv\\'\"?])|([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})"
    rb"|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.?))",
    re.DOTALL,
)
_ESCAPED = dict(zip(b"abfnrtv\\'\"?", b"\a\b\f\n\r\t\v\\'\"?", strict=True))
_TRUE, _FALSE = ("true", "True", "t", "1"), ("false", "False", "f", "0")
_CLOSES = {"{": "}", "<": ">"}


class TextError(ValueError):
    """A text that cannot be read, and where.

    Attributes:
        line: counted from 1.
        column: in characters, counted from 1.
    """

    def __init__(self, file: str, line: int, column: int, what: str) -> None:
        super().__init__(f"{file}:{line}:{column}: {what}")
        self.line = line
        self.column = column


def parse(text: str | bytes, type_name: str, *, file: str = "text") -> Message:
    """Reads a message.

    Args:
        text: all of a file; bytes are taken as UTF-8, and what is not comes back as it was.
        type_name: of the message, for example ``"NetParameter"``.
        file: its name, for errors.

    Raises:
        TextError: it is not such a message; the error says where and why.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="surrogateescape")
    return _Parser(text, file).message(MESSAGES[type_name])


class _Parser:
    """One pass over a text. A token is looked at before it is taken."""

    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._kind, self._token = "", ""
        self._start = self._stop = self._values = 0
        self._advance()

    def message(self, type_: MessageType) -> Message:
        self._root = type_
        return self._fields(type_, closes="", depth=0)

    # Tokens

    def _advance(self) -> None:
        while True:
            match = _TOKEN.match(self._text, self._stop)
            self._start = self._stop
            if match is None:
                if self._stop == len(self._text):
                    self._kind, self._token = "end", ""
                    return
                self._unreadable()
            self._stop = match.end()
            self._kind, self._token = str(match.lastgroup), match[0]
            if self._kind != "space":
                return

    def _unreadable(self) -> NoReturn:
        rest = self._text[self._start : self._start + 30]
        if rest[0] in "\"'":
            self._fail("this string does not end in its line: close it, or escape the line break")
        word = re.match(r"[A-Za-z0-9_.]+|.", rest, re.DOTALL)
        self._fail(f"cannot read {word[0] if word else rest!r}: it is no name, number or mark")

    def _take(self, mark: str) -> bool:
        if self._kind == "mark" and self._token == mark:
            self._advance()
            return True
        return False

    def _fail(self, what: str, at: int | None = None) -> NoReturn:
        offset = self._start if at is None else at
        line = self._line(offset)
        begin = self._ends[line - 2] + 1 if line > 1 else 0
        raise TextError(self._file, line, offset - begin + 1, what)

    def _line(self, offset: int) -> int:
        return bisect_right(self._ends, offset - 1) + 1

    def _found(self) -> str:
        return "the end of the text" if self._kind == "end" else repr(self._token)

    # Grammar

    def _fields(self, type_: MessageType, *, closes: str, depth: int, opened: int = 1) -> Message:
        found = Message(type_)
        found.line = opened
        while True:
            if self._kind == "mark" and self._token == closes:
                break
            if self._kind == "end":
                if closes:
                    self._fail(
                        f"the text ends within {type_.name}, which starts in line {opened}: "
                        f"close it with {closes!r}"
                    )
                break
            self._field(found, depth)
        for field in type_.fields.values():
            if field.required and not found.has(field.name):
                self._fail(f"{type_.name} needs a field {field.name!r}")
        if closes:
            self._advance()
        return found

    def _field(self, into: Message, depth: int) -> None:
        at = self._start
        if self._kind != "name":
            self._fail(f"expected the name of a field of {into.schema.name}, found {self._found()}")
        name = self._token
        field = into.schema.fields.get(name)
        if field is None:
            hint = ": is a bracket not closed?" if depth and name in self._root.fields else ""
            self._fail(
                f"{into.schema.name}, which starts in line {into.line}, has no field {name!r}{hint}"
            )
        self._advance()
        if not field.repeated and into.has(name):
            self._fail(f"field {name!r} of {into.schema.name} is given twice", at)
        colon = self._take(":")
        if field.kind != "message" and not colon:
            self._fail(f"expected ':' behind {name!r}, found {self._found()}")
        if field.repeated and self._take("["):
            into.values.setdefault(name, [])
            if not self._take("]"):
                self._value(field, into, depth)
                while self._take(","):
                    self._value(field, into, depth)
                if not self._take("]"):
                    self._fail(f"expected ',' or ']' in the list {name!r}, found {self._found()}")
        else:
            self._value(field, into, depth)
        if not self._take(","):
            self._take(";")

    def _value(self, field: Field, into: Message, depth: int) -> None:
        if field.kind not in REAL:
            self._values += 1
            if self._values > MOST_VALUES:
                self._fail(f"more than {MOST_VALUES} values")
        if field.kind == "message":
            value = self._nested(field, depth + 1)
        elif field.kind in ("string", "bytes"):
            value = self._string(field)
        elif field.kind in ("float", "double"):
            value = self._real(field)
        elif field.kind == "bool":
            value = self._bool(field)
        elif field.kind == "enum":
            value = self._enum(field)
        else:
            value = self._integer(field)
        if field.repeated:
            into.values.setdefault(field.name, []).append(value)
        else:
            into.values[field.name] = value

    def _nested(self, field: Field, depth: int) -> Message:
        line = self._line(self._start)
        if depth > MOST_NESTED:
            self._fail(f"more than {MOST_NESTED} messages within each other")
        closes = _CLOSES.get(self._token, "") if self._kind == "mark" else ""
        if not closes:
            self._fail(f"expected '{{' behind {field.name!r}, found {self._found()}")
        self._advance()
        return self._fields(field.message, closes=closes, depth=depth, opened=line)

    def _string(self, field: Field) -> str | bytes:
        if self._kind != "string":
            self._fail(f"field {field.name!r} takes text in quotes, not {self._found()}")
        whole = b""
        while self._kind == "string":
            inner = self._token[1:-1].encode("utf-8", errors="surrogateescape")
            whole += _ESCAPE.sub(self._unescaped, inner)
            self._advance()
        if field.kind == "bytes":
            return whole
        return whole.decode("utf-8", errors="surrogateescape")

    def _unescaped(self, match: re.Match[bytes]) -> bytes:
        simple, octal, hexadecimal, short, long, _ = match.groups()
        if simple:
            return bytes([_ESCAPED[simple[0]]])
        if octal and int(octal, 8) < 256:
            return bytes([int(octal, 8)])
        if hexadecimal:
            return bytes([int(hexadecimal, 16)])
        if short or long:
            code = int(short or long, 16)
            if code <= 0x10FFFF and not 0xD800 <= code < 0xE000:
                return chr(code).encode("utf-8")
        return self._fail(f"no escape {match[0].decode('utf-8', 'replace')!r} exists")

    def _signed(self) -> tuple[bool, int]:
        at = self._start
        return self._take("-"), at

    def _integer(self, field: Field) -> int:
        negative, at = self._signed()
        value = self._whole()
        if value is None:
            self._fail(f"field {field.name!r} takes a whole number, not {self._found()}", at)
        low, high = INTEGER_RANGE[field.kind]
        value = -value if negative else value
        if not low <= value <= high:
            self._fail(f"{value} is out of range for {field.name!r}: {low} to {high}", at)
        self._advance()
        return value

    def _whole(self) -> int | None:
        """The number here if it is whole and below 2**64, in any of three bases."""
        token = self._token
        if self._kind != "number" or len(token) > 25:
            return None
        try:
            if token[:1] == "0" and token.isdigit():
                return int(token, 8)
            return int(token, 0)
        except ValueError:
            return None

    def _real(self, field: Field) -> float:
        negative, at = self._signed()
        token = self._token
        if self._kind == "number":
            whole = self._whole()
            value = float(token.rstrip("fF")) if whole is None else float(whole)
        elif self._kind == "name" and token.lower() in ("inf", "infinity", "nan"):
            value = float(token.lower())
        else:
            self._fail(f"field {field.name!r} takes a number, not {self._found()}", at)
        self._advance()
        value = -value if negative else value
        return float(to_float32(value)) if field.kind == "float" else value

    def _bool(self, field: Field) -> bool:
        token = self._token
        if token not in _TRUE and token not in _FALSE:
            self._fail(f"field {field.name!r} takes true or false, not {self._found()}")
        self._advance()
        return token in _TRUE

    def _enum(self, field: Field) -> str:
        token = self._token
        if self._kind == "number":
            token = field.enum.names.get(int(token) if token.isdigit() else -1, "")
        elif self._kind != "name":
            token = ""
        if token not in field.enum.values:
            known = ", ".join(field.enum.values)
            self._fail(f"field {field.name!r} takes one of {known}, not {self._found()}")
        self._advance()
        return token
