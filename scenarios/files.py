"""Instruction files as rows: of a file only the places of its records are kept in memory."""

import os
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.instructions import Found, Reading, load, refuse_missing
from fedstrata.scenarios.jsonfile import parse, scan
from fedstrata.scenarios.rows import Rows

__all__ = ["Found", "Reading", "load_file", "refuse_missing"]

Stamp = tuple[int, int]


def load_file(path: Path, reading: Reading, found: Found) -> Rows:
    """Checks every record of a file. Raises `BadInput`, see `load`; missing pictures are told to `found` instead."""
    return load(JsonFile(path), reading, found)


class JsonFile:
    """The records of a JSON file, read again one by one as long as size and time of last change stay as they are."""

    def __init__(self, path: Path) -> None:
        self.path, self.label, self.short = path, str(path), path.name
        self._starts, self._lengths = array("q"), array("L")
        self._stamp: Stamp | None = None

    def scan(self) -> Iterator[Any]:
        self._starts, self._lengths = array("q"), array("L")
        self._stamp = _stamp(self.path)
        for record in scan(self.path):
            self._starts.append(record.start)
            self._lengths.append(record.length)
            yield record.value
        self._check_stamp()

    def fetch(self, number: int) -> Any:
        start, length = self._starts[number - 1], self._lengths[number - 1]
        stamp = self._check_stamp()
        try:
            return parse(os.pread(_opened(self.label, os.getpid(), stamp).descriptor, length, start))
        except OSError as error:
            raise BadInput(f"{self.path}: record {number}: not readable: {error.strerror}") from error
        except RecursionError:  # it was read from nearer to the bottom of the stack when it was loaded
            raise BadInput(f"{self.path}: record {number}: must not be nested that deeply") from None
        except ValueError as error:  # somebody wrote into it and set its time back
            raise BadInput(f"{self.path}: record {number}: was changed since it was loaded; start again") from error

    def _check_stamp(self) -> Stamp:
        now = _stamp(self.path)
        if now is None:
            raise BadInput(f"{self.path}: is gone since it was loaded; put it back and start again")
        if now != self._stamp:
            raise BadInput(f"{self.path}: was changed since it was loaded; start again")
        return now


def _stamp(path: Path) -> Stamp | None:
    """Size and time of the last change; None where nothing is."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # a NUL in its name
        return None
    return found.st_size, found.st_mtime_ns


class _Open:
    """A descriptor that is closed when the cache lets go of it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # opening may have failed
            os.close(self.descriptor)


@lru_cache(maxsize=256)
def _opened(path: str, process: int, stamp: Stamp) -> _Open:
    """One descriptor per file and process: a child must not share its parent's."""
    return _Open(path)
