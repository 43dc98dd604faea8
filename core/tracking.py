"""Experiment tracking behind one door: `open_tracker` gives a `Tracker`, and nobody else knows who listens.

`events.jsonl` in the run folder is always written; Weights & Biases follows when `track.wandb` says so.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from fedstrata.core.config import TrackSection
from fedstrata.core.errors import BadInput

Mode = Literal["offline", "online"]


class Tracker(Protocol):
    """Someone who wants to know what happens in a run."""

    def event(self, name: str, /, **fields: Any) -> None:
        """Something happened; `fields` are numbers, strings, lists and dicts of them."""

    def close(self) -> None:
        """No more events come."""


class JsonLines:
    """Appends one JSON object per event to a file: {"time": ISO 8601 in UTC, "event": name, ...}.

    Each line is flushed, so what is on disk is what happened. A line that an earlier, killed process left half-written
    is cut off first: appending to it would spoil the next event too.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def event(self, name: str, /, **fields: Any) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, **plain(fields)}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Wandb:
    """Weights & Biases: "round" and "stage_scored" become history, "run_finished" becomes the run's summary.

    Keys are the event's name and the path to the number: `round/loss`, `stage_scored/scores/names`. Lists stay out.

    Raises:
        BadInput: wandb refuses to start (no account in `online` mode, for example).
    """

    def __init__(self, mode: Mode, project: str, config: Mapping[str, Any], dir: Path, name: str) -> None:
        import wandb  # here: it takes a second to import, and most commands never need it

        quiet = wandb.Settings(console="off", silent=mode == "offline")  # the console belongs to the progress display
        try:
            self._run = wandb.init(
                mode=mode,
                project=project,
                config=dict(config),
                dir=str(dir),
                name=name,
                settings=quiet,
                reinit="create_new",  # several runs in one process (a sweep, a test) must not share one
            )
        except wandb.Error as error:
            raise BadInput(f"track.wandb: {mode} does not work: {error}") from error
        self._completed = False

    def event(self, name: str, /, **fields: Any) -> None:
        if name in ("round", "stage_scored"):
            self._run.log(dict(_numbers(plain(fields), name)))
        elif name == "run_finished":
            self._completed = fields.get("status") == "completed"
            self._run.summary.update(plain(fields))

    def close(self) -> None:
        """Marks the run as failed on W&B unless a "run_finished" event said that it was completed."""
        self._run.finish(exit_code=0 if self._completed else 1)


class Trackers:
    """Tells several trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def event(self, name: str, /, **fields: Any) -> None:
        for tracker in self._trackers:
            tracker.event(name, **fields)

    def close(self) -> None:
        with ExitStack() as stack:  # all are closed, even when one of them fails
            for tracker in reversed(self._trackers):
                stack.callback(tracker.close)


def open_tracker(track: TrackSection, run_dir: Path, config: Mapping[str, Any], name: str) -> Tracker:
    """The run's tracker: `run_dir/events.jsonl`, and W&B (its files under `run_dir/wandb`) unless it is disabled."""
    lines = JsonLines(run_dir / "events.jsonl")
    if track.wandb == "disabled":
        return lines
    try:
        return Trackers([lines, Wandb(cast(Mode, track.wandb), track.project, config, run_dir, name)])
    except BaseException:
        lines.close()
        raise


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays become numbers and lists, NaN and infinities None, other things strings."""
    if hasattr(value, "tolist"):  # NumPy and torch, scalars too, known by their method
        value = value.tolist()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, set | frozenset):
        return [plain(inner) for inner in sorted(value)]
    if isinstance(value, Sequence):
        return [plain(inner) for inner in value]
    return str(value)


def _numbers(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers in nested dicts, with "/" between the keys; booleans count as 0 and 1."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float):
            yield f"{prefix}/{key}", value if isinstance(value, float) else int(value)


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    whole = path.read_bytes().rfind(b"\n") + 1
    if whole < path.stat().st_size:
        os.truncate(path, whole)
