"""A JSON array, or one JSON value a line (.jsonl), read record by record.

Whatever is wrong is one `BadInput` that names the file, the record (counted from 1), the rule and what came.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedstrata.core.errors import BadInput

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def read_records(path: Path) -> Iterator[Any]:
    """The file's records as JSON values, one after another. Raises `BadInput` as described at the top."""
    return _parse(path, _text(path))


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


def _parse(path: Path, text: str) -> Iterator[Any]:
    if not text.strip():
        raise BadInput(f"{path}: must hold a JSON array of records, got an empty file")
    return _lines(path, text) if path.suffix.lower() == ".jsonl" else _array(path, text)


def _text(path: Path) -> str:
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: not a readable file: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = len(data) - len(error.object) + error.start  # the codec drops a byte order mark
        number = _whole_records(path, data[:start].decode("utf-8-sig", errors="ignore")) + 1
        came = f"{data[start : start + 4]!r} at byte {start}"
        raise BadInput(f"{path}: record {number}: must be UTF-8 text, got {came}") from error


def _whole_records(path: Path, beginning: str) -> int:
    """How many whole records a beginning of the file holds."""
    count = 0
    try:
        for _ in _parse(path, beginning):
            count += 1
    except BadInput:
        pass
    return count


def _lines(path: Path, text: str) -> Iterator[Any]:
    lines = (line for line in text.split("\n") if line.strip())  # splitlines would also cut at U+2028
    for number, line in enumerate(lines, 1):
        record, end = _value(path, number, line, _after(line, 0))
        if _after(line, end) < len(line):
            raise BadInput(f"{path}: record {number}: must be one JSON value a line, got {brief(line[end:])} after it")
        yield record


def _array(path: Path, text: str) -> Iterator[Any]:
    """Value by value: a mistake is reported with its record, and one record is in memory at a time."""
    at, number = _after(text, 0), 0
    if text[at] != "[":
        came = brief(text[at : at + 40])
        raise BadInput(f"{path}: must hold a JSON array of records (or be named .jsonl), got {came}")
    at = _after(text, at + 1)
    more = text[at : at + 1] != "]"
    while more:
        number += 1
        record, end = _value(path, number, text, at)
        yield record
        at = _after(text, end)
        more = _is_comma(path, number, text, at)
        at = _after(text, at + 1) if more else at
    if _after(text, at + 1) < len(text):
        came = brief(text[at + 1 : at + 41])
        raise BadInput(f"{path}: record {number}: must be the last before the end of the file, got {came} after it")


def _is_comma(path: Path, number: int, text: str, at: int) -> bool:
    mark = text[at : at + 1]
    if mark not in (",", "]"):
        came = f"got {brief(text[at : at + 20])}" if mark else "but the file ends: is it truncated?"
        raise BadInput(f"{path}: record {number}: must be followed by ',' or ']', {came}")
    return mark == ","


def _value(path: Path, number: int, text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at `at`, and where it ends."""
    where = f"{path}: record {number}:"
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise BadInput(f"{where} must not be nested that deeply") from None
    except json.JSONDecodeError as error:
        ended = error.pos >= len(text) or error.msg.startswith("Unterminated")
        came = "the end of the file: is it truncated?" if ended else brief(text[error.pos :][:40])
        raise BadInput(f"{where} must be JSON: {error.msg} at line {error.lineno}, got {came}") from error
    except ValueError as error:  # a number of thousands of digits
        raise BadInput(f"{where} must be JSON: {error}") from error


def _after(text: str, at: int) -> int:
    """The first place from `at` on that is no white space."""
    found = _SPACE.match(text, at)
    return found.end() if found else at
