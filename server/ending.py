"""The last words of a run folder: summary.json, the last event and the report."""

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from fedstrata.core import durable
from fedstrata.core.metrics import AccuracyMatrix
from fedstrata.core.tracking import JsonLines, Tracker, plain
from fedstrata.server import checkpoint, resuming
from fedstrata.server.planned import actual_of, compare
from fedstrata.server.progress import Progress
from fedstrata.server.report import write_report
from fedstrata.server.runfolder import CHECKPOINTS, EVENTS, SUMMARY, RunFolder, locked
from fedstrata.server.summary import of_commit


def write(folder: Path, progress: Progress, told: Mapping[str, Any], tracker: Tracker) -> None:
    """Writes the summary `told`, with what was refused and planned, and closes the tracker."""
    planned = compare(RunFolder(folder).events(), actual_of(progress))
    summary = plain({**told, "rejected": dict(progress.rejected), "plan": planned})
    with closing(tracker):
        durable.write_atomic(folder / SUMMARY, json.dumps(summary, indent=1).encode())
        tracker.event("run_finished", **summary)


def interrupted(folder: Path) -> None:
    """Writes the end of a run whose process is gone without one, from its last commit.

    Raises:
        BadInput: another process has gone on with it, or its config or commits cannot be read.
        OSError: the folder cannot be written.
    """
    config = resuming.read_config(RunFolder(folder))
    with locked(folder):
        commit = checkpoint.newest(folder / CHECKPOINTS)
        progress = Progress.from_json(commit.progress) if commit else Progress(AccuracyMatrix((), (), ()))
        write(folder, progress, of_commit(config, progress, commit), JsonLines(folder / EVENTS))
        write_report(folder)
