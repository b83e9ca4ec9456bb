"""Reads messages from text: the format of ``.prototxt`` files.

Protobuf's own reader says what the text means. It does not say in which line a message starts, and
lets some texts pass that Caffe refuses, so the marks of a text are gone through first.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import Any, NoReturn

from soonest.caffe.proto.message import Message
from soonest.caffe.proto.protobuf import CLASSES, from_protobuf, text_format
from soonest.caffe.proto.schema import ENUMS
from soonest.caffe.proto.text.outline import Outline, UnreadableError, outline

_REWRITTEN = re.compile(r"\#[^\n]*|\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|-[ \t]+(?=[0-9.a-z])")
"""Comments, strings, and a sign that stands apart from its number."""
_CHARACTER = re.compile(r"\\(?:u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)|[\udc80-\udcff]", re.DOTALL)
_WORDS = (
    (r'^Message type "\w+\.(\w+)" has no field named "(\w+)"', r"\1 has no field '\2'"),
    (r'^Message type "\w+\.(\w+)" should not have multiple "(\w+)".*', r"'\2' is given twice"),
    (r"^Message type .* does not have extensions", "expected the name of a field, found '['"),
    (r"^Expected identifier or number, got (.*)\.$", r"expected the name of a field, found '\1'"),
    (r"^Expected identifier\.$", "expected the name of a field"),
    (r'^Expected "(.)"\.$', r"expected '\1'"),
    (r"^Couldn't parse integer: (.*)$", r"expected a whole number, found '\1'"),
    (r"^(?:Couldn't parse|Invalid octal) float: (.*)$", r"expected a number, found '\1'"),
    (r"^Expected string but found: (.*)$", r"expected text in quotes, found \1"),
    (r'^Expected "true" or "false"\.$', "expected true or false"),
)
"""How errors of protobuf's reader start, and what we say instead."""
_HINTS = {
    "ceil_mode": "that is of a fork: BVLC's word is round_mode, FLOOR for false and CEIL for true",
}
"""Fields of Caffe's forks that are often met, and what stands for them."""
_LONGEST = 200


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
    return _Text(text, file).message(type_name)


class _Text:
    """A text, and where things are in it."""

    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file
        self._ends = [match.start() for match in re.finditer("\n", text)]

    def message(self, type_name: str) -> Message:
        try:
            root, unclosed = outline(self._text)
        except UnreadableError as error:
            self._refuse_earlier(error.at, type_name)
            self._fail(error.at, str(error))
        found = CLASSES[type_name]()
        try:
            text_format.Parse(_REWRITTEN.sub(_rewritten, self._text), found)
        except text_format.ParseError as error:
            self._refuse(error, type_name, unclosed)
        for path in found.FindInitializationErrors():
            *above, name = path.split(".")
            self._fail(_followed(root, above).at, f"a field {name!r} is needed here")
        message = from_protobuf(found)
        self._place(message, root)
        return message

    def _place(self, message: Message, outline: Outline) -> None:
        """Gives a message, and those in it, their lines."""
        message.line = self._line(outline.at)
        for name, starts in outline.within.items():
            values: Any = message.values[name]
            for one, start in zip(values if isinstance(values, list) else [values], starts,
                                  strict=True):  # fmt: skip
                self._place(one, start)

    def _line(self, at: int) -> int:
        return bisect_left(self._ends, at) + 1

    def _fail(self, at: int, what: str) -> NoReturn:
        begin = self._text.rfind("\n", 0, at) + 1
        raise TextError(self._file, self._line(at), at - begin + 1, what)

    def _refuse_earlier(self, at: int, type_name: str) -> None:
        """Raises TextError if something is wrong before a place already."""
        before = self._text[:at]
        try:
            text_format.Parse(_REWRITTEN.sub(_rewritten, before), CLASSES[type_name]())
        except text_format.ParseError as error:
            line = error.GetLine() or 1
            begin = self._ends[line - 2] + 1 if line > 1 else 0
            is_end = re.search(r'Expected "[}>]"\.$', str(error))
            if not is_end and begin + (error.GetColumn() or 1) - 1 < len(before.rstrip()):
                self._refuse(error, type_name, None)

    def _refuse(self, error: Any, type_name: str, unclosed: Outline | None) -> NoReturn:
        line, column = error.GetLine(), error.GetColumn()
        what = str(error).removeprefix(f"{line}:{column} : ")
        shown = self._text.split("\n")[line - 1]
        for line_before in (_REWRITTEN.sub(_rewritten, shown), ""):  # It is none at the end.
            what = what.removeprefix(f"'{line_before}': ")
        if unclosed and what == f'Expected "{unclosed.closes}".':
            self._fail(
                len(self._text),
                f"the text ends within what starts in line {self._line(unclosed.at)}: close it "
                f"with {unclosed.closes!r}",
            )
        column = _before_rewriting(shown, column)
        raise TextError(self._file, line, column, _in_our_words(what, type_name, unclosed))


def _in_our_words(what: str, type_name: str, unclosed: Outline | None) -> str:
    if enum := re.match(
        r'Enum type "\w+\.([\w.]+)" has no value (?:named|with number) (.*)\.', what
    ):
        return f"expected one of {', '.join(ENUMS[enum[1]].values)}, found {enum[2]!r}"
    for pattern, ours in _WORDS:
        if match := re.match(pattern, what, re.DOTALL):
            said = match.expand(ours)
            unknown = re.search(r"has no field '(\w+)'", said)
            if unknown and unknown[1] in _HINTS:
                said += f": {_HINTS[unknown[1]]}"
            elif (
                unknown and unclosed and unknown[1] in CLASSES[type_name].DESCRIPTOR.fields_by_name
            ):
                said += ": is a bracket not closed?"
            return said if len(said) < _LONGEST else said[:_LONGEST] + "…"
    return what if len(what) < _LONGEST else what[:_LONGEST] + "…"


def _followed(outline: Outline, path: list[str]) -> Outline:
    """The message at the end of a path such as ``layer[3].clip_param``."""
    for step in path:
        name, _, number = step.rstrip("]").partition("[")
        outline = outline.within[name][int(number or 0)]
    return outline


def _before_rewriting(line: str, column: int) -> int:
    """Where in a line that stands which is at a column once it is rewritten."""
    for match in _REWRITTEN.finditer(line):
        if match.start() + 1 >= column:
            break
        column -= len(_rewritten(match)) - len(match[0])
    return column


def _rewritten(match: re.Match[str]) -> str:
    """What protobuf's reader takes for the same."""
    token = match[0]
    if token[0] == "-":
        return " " * (len(token) - 1) + "-"
    return _CHARACTER.sub(_as_bytes, token)


def _as_bytes(match: re.Match[str]) -> str:
    """What stands for a character that protobuf's reader does not bring back: its bytes."""
    token = match[0]
    if token[0] != "\\":
        return f"\\{ord(token) - 0xDC00:03o}"
    if token[1] not in "uU":
        return token
    return "".join(f"\\{byte:03o}" for byte in chr(int(token[2:], 16)).encode())
