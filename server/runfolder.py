"""The read side of a run folder: what a run left behind, or one clear message about the file that is missing or broken.

config.yaml (appears first), events.jsonl, matrix.json, summary.json, predictions/, checkpoints/, report.html.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from fedstrata.core import durable
from fedstrata.core.config import read_yaml
from fedstrata.core.errors import BadInput
from fedstrata.core.metrics import AccuracyMatrix

CONFIG, EVENTS, MATRIX, SUMMARY, REPORT = "config.yaml", "events.jsonl", "matrix.json", "summary.json", "report.html"
CHECKPOINTS, LOCK = "checkpoints", "lock"
SUMMARY_VERSION = 1
PATIENCE = 0.5  # seconds that a run folder's lock is waited for


class RunFolder:
    """A run folder as values; each file is read when it is first asked for.

    Raises:
        BadInput: the folder or its config.yaml is missing; or a file that is asked for is missing or broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise BadInput(f"{path}: no such run folder")
        if not self.has(CONFIG):
            raise BadInput(f"{path}: not a run folder: {CONFIG} is missing")

    def has(self, name: str) -> bool:
        """Whether the folder holds a file `name`; an interrupted run has no summary and perhaps no matrix."""
        return (self.path / name).is_file()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config as plain dicts, the form that `core.config.from_dict` reads."""
        return read_yaml(self.path / CONFIG)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """How the run ended; undefined values are None."""
        return read_summary(read_json(self.path / SUMMARY), str(self.path / SUMMARY))

    @cached_property
    def matrix(self) -> AccuracyMatrix:
        """The accuracy matrix; a run that goes on or was interrupted has fewer rows than stages + 1."""
        return AccuracyMatrix.from_json(read_json(self.path / MATRIX), str(self.path / MATRIX))

    def events(self) -> list[dict[str, Any]]:
        """What happened, in order; empty when nothing has yet. A half-written last line is left out.

        Where a resumed run went back, what was told of rounds that it then ran again is left out too.
        """
        return read_events(self.path / EVENTS)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a file as `RunFolder.events` gives them; empty when there is no file."""
    if not path.is_file():
        return []
    *lines, _torn = _bytes(path).split(b"\n")  # bytes: a line may be torn inside a character
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        event = _event(line)
        if event is None:
            raise BadInput(f"{path}: line {number} is not an event (a JSON object with an 'event' name)")
        if event["event"] == "resumed":
            events = [before for before in events if not _again(before, event)]
        events.append(event)
    return events


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises `BadInput` naming the file when it is missing or not JSON."""
    try:
        return json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a readable JSON file: {error}") from error


def read_summary(tree: Any, source: str) -> dict[str, Any]:
    """Checks a summary's shape: a mapping of this version. Raises `BadInput`, beginning with `source`."""
    if not isinstance(tree, dict):
        raise BadInput(f"{source}: must hold an object, got {type(tree).__name__}")
    if tree.get("version") != SUMMARY_VERSION:
        raise BadInput(f"{source}: version must be {SUMMARY_VERSION}, got {tree.get('version')!r}")
    return tree


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: not a readable file: {error}") from error


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("event"), str) else None


def _again(event: dict[str, Any], resumed: dict[str, Any]) -> bool:
    """Whether an event is about a round or a stage that a resumed run goes through again."""
    if "stage" not in event or event["event"] == "resumed":
        return False
    at = (event["stage"], event.get("round", resumed["round"]))
    return bool(at >= (resumed["stage"], resumed["round"]))


def unused(path: Path) -> bool:
    """Whether a folder holds nothing, or nothing but what a run leaves that was killed before it began."""
    begun = (path / CHECKPOINTS, path / CHECKPOINTS / LOCK, path / f".{CONFIG}.tmp")
    return all(entry in begun for entry in path.rglob("*"))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process writes a run folder at a time; the lock ends with its process, however that ends.

    Raises:
        BadInput: another process holds it; names its id.
    """
    durable.make_folder(path / CHECKPOINTS)
    file = os.open(path / CHECKPOINTS / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _taken(file):
            holder = os.read(file, 20).decode(errors="replace") or "?"
            raise BadInput(f"{path}: is being written by process {holder}")
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the number
            os.ftruncate(file, 0)
            os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)


def _taken(file: int) -> bool:
    """Whether the lock is ours now; a process that has just been killed takes a moment to let go of it."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(PATIENCE / 10)
        else:
            return True
