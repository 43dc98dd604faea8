"""A JSON array, or one JSON value a line (.jsonl), read record by record: neither file nor records are held in memory.

Whatever is wrong is one `BadInput` that names the file, the record (counted from 1), the rule and what came.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fedstrata.core.errors import BadInput

CHUNK = 2**20
MOST_BYTES = 2**26  # of one record; a quote that is never closed must not read a whole file into memory
TOKEN = 16  # characters: a mistake this near to the end of what was read may only be a token cut in two
_SPACE = re.compile(r"[ \t\r\n]*")
BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class Record:
    """One JSON value, and its place in the file in bytes."""

    value: Any
    start: int
    length: int


def read_records(path: Path) -> Iterator[Any]:
    """The file's records as JSON values, one after another. Raises `BadInput` as described at the top."""
    return (record.value for record in scan(path))


def scan(path: Path) -> Iterator[Record]:
    """The file's records with their places. Raises `BadInput` as described at the top."""
    try:
        if not path.is_file():
            raise BadInput(f"{path}: no such file")
        with path.open("rb") as file:
            yield from _lines(path, file) if path.suffix.lower() == ".jsonl" else _Array(path, file).records()
    except OSError as error:
        raise BadInput(f"{path}: not a readable file: {error.strerror}") from error


def parse(data: bytes) -> Any:
    """One record's bytes as `scan` placed them."""
    return _DECODER.decode(data.decode("utf-8"))


def is_folder(path: Path) -> bool:
    """Whether it is one; False too for what can be no file name at all."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def brief(value: object) -> str:
    """What came, short enough for a message.

    >>> brief([1, 2]), brief("yes")
    ('a list of 2', "'yes'")
    """
    if isinstance(value, str):
        return repr(value[:60]) + ("..." if len(value) > 60 else "")
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:60]


class _Duplicate(ValueError):
    """A key that comes twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Duplicate(next(key for key in keys if keys.count(key) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _lines(path: Path, file: BinaryIO) -> Iterator[Record]:
    number, start = 0, 0
    most = MOST_BYTES + len(BOM + b"\r\n")
    for line in iter(lambda: file.readline(most), b""):
        skip = len(BOM) if start == 0 and line.startswith(BOM) else 0
        body = line[skip:].strip(b" \t\r\n")
        if body:
            number += 1
            where = f"{path}: record {number}:"
            _refuse_long(where, len(body) if len(line) < most or line.endswith(b"\n") else len(line))
            place = start + line.index(body, skip)
            yield Record(_line(where, body, place), place, len(body))
        start += len(line)
    if not number:
        raise BadInput(f"{path}: must hold a JSON array of records, got an empty file")


def _line(where: str, body: bytes, start: int) -> Any:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        came = body[error.start : error.start + 4]
        raise BadInput(f"{where} must be UTF-8 text, got {came!r} at byte {start + error.start}") from error
    value, end = _value(where, text, 0)
    if end < len(text):
        raise BadInput(f"{where} must be one JSON value a line, got {brief(text[end:])} after it")
    return value


class _Array:
    """A window of text that slides over the file; `place` is the byte at which the text before `at` ends."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.place, self.number = "", 0, 0, 0
        self.read, self.ended, self.bad = 0, False, ""
        if self._peek() == "\ufeff":
            self._move(1)

    def records(self) -> Iterator[Record]:
        self._skip_space()
        if self._peek() != "[":
            self._check_text()
            if not self._peek():
                raise BadInput(f"{self.path}: must hold a JSON array of records, got an empty file")
            came = brief(self.text[self.at : self.at + 40])
            raise BadInput(f"{self.path}: must hold a JSON array of records (or be named .jsonl), got {came}")
        self._move(1)
        self._skip_space()
        more = self._peek() != "]"
        while more:
            self.number += 1
            yield self._record()
            self._skip_space()
            more = self._is_comma()
            self._move(more)
            self._skip_space()
        self._move(1)
        self._skip_space()
        self._check_text()
        if self._peek():
            came = brief(self.text[self.at : self.at + 40])
            rule = "must be the last before the end of the file"
            raise BadInput(f"{self.path}: record {self.number}: {rule}, got {came} after it")

    def _record(self) -> Record:
        where = f"{self.path}: record {self.number}:"
        while True:
            try:
                value, end = _value(where, self.text, self.at, partial=not self.ended or bool(self.bad))
                margin = 0 if self.ended else TOKEN  # "1." may become 1.5
                if end < len(self.text) - margin or (self.ended and not self.bad):
                    break
            except _Incomplete:
                pass
            self._check_text()
            _refuse_long(where, len(self.text) - self.at - TOKEN)
            self._fill()
        start = self.place
        self._move(end - self.at)
        _refuse_long(where, self.place - start)
        return Record(value, start, self.place - start)

    def _is_comma(self) -> bool:
        mark = self._peek()
        if mark not in (",", "]") or not mark:
            self._check_text()
            came = f"got {brief(self.text[self.at : self.at + 20])}" if mark else "but the file ends: is it truncated?"
            raise BadInput(f"{self.path}: record {self.number}: must be followed by ',' or ']', {came}")
        return mark == ","

    def _peek(self) -> str:
        while self.at == len(self.text) and not self.ended:
            self._fill()
        return self.text[self.at : self.at + 1]

    def _skip_space(self) -> None:
        while self._peek():
            found = _SPACE.match(self.text, self.at)
            end = found.end() if found else self.at
            self._move(end - self.at)
            if end < len(self.text):
                return

    def _move(self, count: int) -> None:
        passed = self.text[self.at : self.at + count]
        self.place += len(passed) if passed.isascii() else len(passed.encode())
        self.at += count

    def _fill(self) -> None:
        """Drops what was read, reads as much again as is left, at least a chunk."""
        self.text, self.at = self.text[self.at :], 0
        data = self.file.read(max(CHUNK, len(self.text)))
        pending = len(self.decoder.getstate()[0])
        try:
            self.text += self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            good = error.object[: error.start].decode("utf-8")
            self.bad = f"{error.object[error.start : error.start + 4]!r} at byte {self.read - pending + error.start}"
            self.text, data = self.text + good, b""
        self.read += len(data)
        self.ended = not data

    def _check_text(self) -> None:
        """What was decoded is used up: was it because the rest is no text?"""
        if self.bad and self.ended:
            raise BadInput(f"{self.path}: record {max(1, self.number)}: must be UTF-8 text, got {self.bad}")


def _refuse_long(where: str, size: int) -> None:
    if size > MOST_BYTES:
        raise BadInput(f"{where} must have at most {MOST_BYTES:,} bytes")


class _Incomplete(Exception):
    """The value goes on beyond what has been read."""


def _value(where: str, text: str, at: int, partial: bool = False) -> tuple[Any, int]:
    """The JSON value that begins at `at`, and where it ends; `partial`: more text may follow."""
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise BadInput(f"{where} must not be nested that deeply") from None
    except json.JSONDecodeError as error:
        open_end = error.msg.startswith("Unterminated") or error.pos >= len(text) - TOKEN
        if partial and open_end:
            raise _Incomplete from None
        ended = error.pos >= len(text) or error.msg.startswith("Unterminated")
        came = "the end of the file: is it truncated?" if ended else brief(text[error.pos :][:40])
        raise BadInput(f"{where} must be JSON: {error.msg}, got {came}") from error
    except _Duplicate as error:
        raise BadInput(f"{where} must not have a key twice, got {brief(str(error))} again") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadInput(f"{where} must be JSON: {error}") from error
