"""A JSON file whose one list is long: its elements one by one, so that memory does not grow with the file.

What is held is the part of the file that is being read, 1 MiB or twice the longest element, and that element.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20  # characters
LONGEST = 1 << 26  # characters of one value: beyond it is no list of events
CUT = 16  # a cut literal or escape is shorter


class Number(str):
    """The text of a number that is no integer, so that none of its digits is lost."""

    __slots__ = ()


_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(parse_float=Number, parse_constant=Number)


def members(file: TextIO, list_name: str) -> Iterator[tuple[str | None, Any]]:
    """The members of an object by name, but of the one called `list_name` each element, by None.

    A file that is a list from the start is one of such elements; its end may be missing, as writers that were killed
    leave it (Trace Event Format, Google 2016).  Numbers that are no integers come as `Number`.

    Raises: ValueError that tells the element and the character, if it is not JSON or is cut short.
    """
    text = _Text(file, list_name)
    match text.peek():
        case "[":
            yield from text.elements(may_be_cut=True)
        case "{":
            yield from text.members()
        case "":
            raise ValueError("it is empty")
        case other:
            raise ValueError(f"JSON begins with {{ or [, found {other!r}")
    if rest := text.peek():
        raise text.broken(f"after its end comes {rest!r}")


class _Text:
    """The part of the file that is being read."""

    def __init__(self, file: TextIO, list_name: str) -> None:
        self._file, self._list_name = file, list_name
        self._buffer, self._at, self._ended = "", 0, False
        self._before = 0  # characters that are dropped
        self._element: int | None = None

    def broken(self, why: str, at: int | None = None) -> ValueError:
        where = "its head" if self._element is None else f"event {self._element}"
        character = self._before + (self._at if at is None else at)
        return ValueError(f"broken JSON in {where}, character {character}: {why}")

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end."""
        while True:
            self._at = _SPACE.match(self._buffer, self._at).end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                return ""
            self._read()

    def members(self) -> Iterator[tuple[str | None, Any]]:
        self._take("{")
        if self.peek() == "}":
            return self._take("}")
        while True:
            name = self._value()
            if not isinstance(name, str):
                raise self.broken("a name must be a string")
            self._take(":")
            if name == self._list_name and self.peek() == "[":
                yield from self.elements(may_be_cut=False)
                self._element = None
            else:
                yield name, self._value()
            if self._separator("}"):
                return None

    def elements(self, may_be_cut: bool) -> Iterator[tuple[None, Any]]:
        self._take("[")
        self._element = 0
        if self.peek() == "]":
            return self._take("]")
        while not (may_be_cut and self.peek() == ""):
            yield None, self._value()
            self._element += 1
            if (may_be_cut and self.peek() == "") or self._separator("]"):
                return None

    def _separator(self, end: str) -> bool:
        """Whether it is the end and no comma."""
        is_end = self.peek() == end
        self._take(end if is_end else ",")
        return is_end

    def _take(self, wanted: str) -> None:
        found = self.peek()
        if found != wanted:
            raise self.broken(f"wanted {wanted!r}, found {found!r}" if found else "the file ends here")
        self._at += 1

    def _read(self) -> None:
        """Twice of what is left, so that the cost stays linear in a long value."""
        self._buffer = self._buffer[self._at :]
        self._before += self._at
        self._at = 0
        if len(self._buffer) > LONGEST:
            raise self.broken(f"a value of more than {LONGEST} characters")
        chunk = self._file.read(max(CHUNK, len(self._buffer)))
        self._ended = not chunk
        self._buffer += chunk

    def _value(self) -> Any:
        if not self.peek():
            raise self.broken("the file ends here")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                is_open = error.msg.startswith("Unterminated string")
                if self._ended and (is_open or error.pos >= len(self._buffer.rstrip())):
                    raise self.broken("the file ends here", len(self._buffer)) from None
                if self._ended or not (is_open or error.pos >= len(self._buffer) - CUT):
                    raise self.broken(error.msg, error.pos) from None
            except RecursionError:
                raise self.broken("it is nested too deeply") from None
            except ValueError as error:  # an integer of thousands of digits
                raise self.broken(str(error)) from None
            else:
                if end < len(self._buffer) or self._ended:  # else a number may go on
                    self._at = end
                    return value
            self._read()
