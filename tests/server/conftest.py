"""A tiny run folder, written by hand: two stages, two tasks, one subspace each."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedstrata.core.metrics import AccuracyMatrix

WriteRun = Callable[..., Path]
ROWS = ((0.0, 10.0), (90.0, 20.0), (80.0, 70.0))


def run_matrix(tasks: tuple[str, str], rows: Sequence[tuple[float, float]]) -> AccuracyMatrix:
    """Stage t trains task t; 50 test examples a task; 96 % of the first task's answers are from its vocabulary."""
    matrix = AccuracyMatrix(tasks, tasks, ("exact_match", "exact_match"))
    for scores, trained in zip(rows, [(), tasks[:1], tasks[1:]], strict=False):
        named = dict(zip(tasks, scores, strict=True))
        matrix = matrix.add_row(named, trained, dict.fromkeys(tasks, 50), {tasks[0]: 96.0})
    return matrix


def run_events(tasks: tuple[str, str]) -> list[dict[str, Any]]:
    """Two rounds in stage 1 (the second skipped), one in stage 2, where a client is rejected."""

    def participants(client: int, task: str, subspace: int, samples: int) -> list[dict[str, Any]]:
        return [{"client": client, "tasks": [task], "subspace": subspace, "samples": samples, "loss": 1.0}]

    cost = {"bytes_up": 1000, "bytes_down": 2000, "seconds": 1.5, "train_seconds": 1.0}
    scored = {"event": "stage_scored", "bytes_eval": 500, "seconds": 2.0}
    first = [*participants(3, tasks[0], 0, 61), *participants(5, tasks[0], 0, 40)]
    return [
        {"event": "run_started", "strategy": "disco", "uses_task_identity": False},
        {**scored, "stage": 0, "scores": dict(zip(tasks, ROWS[0], strict=True))},
        {"event": "round", "stage": 1, "round": 1, "participants": first, "opened": [0], "skipped": False, **cost},
        {"event": "round", "stage": 1, "round": 2, "participants": [], "opened": [], "skipped": True, **cost},
        {**scored, "stage": 1, "routing": {tasks[0]: [50], tasks[1]: [50]}},
        {"event": "rejected", "stage": 2, "round": 1, "client": 7, "reason": "not finite"},
        {
            "event": "round",
            "stage": 2,
            "round": 1,
            "participants": participants(3, tasks[1], 1, 30),
            "opened": [1],
            "skipped": False,
            **cost,
        },
        {
            **scored,
            "stage": 2,
            "routing": {tasks[0]: [49, 1], tasks[1]: [5, 45]},
            "cosines": {"within": [0.99, 0.97], "between": [0.25]},
        },
    ]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes `tmp_path/<name>` and returns it; `summary` and `config` are merged over the defaults.

    `done`: rows of the matrix that exist; `ended`: whether there is a summary.json.
    """

    def write(
        name: str = "run",
        strategy: str = "disco",
        seed: int = 0,
        options: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        summary: dict[str, Any] | None = None,
        rows: Sequence[tuple[float, float]] = ROWS,
        tasks: tuple[str, str] = ("names", "charts"),
        ended: bool = True,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tree = {
            "seed": seed,
            "run": {"dir": str(folder)},
            "strategy": {"name": strategy, **(options or {})},
            "scenario": {"name": "toy", "beta": None},
            "federation": {"clients": 4, "actors": 1},
            **(config or {}),
        }
        matrix = run_matrix(tasks, rows)
        measured = {name: getattr(matrix, name) for name in ("last", "avg", "forgetting", "bwt", "fwt")}
        end = {
            "version": 1,
            "status": "completed",
            "seed": seed,
            "strategy": strategy,
            "scenario_hash": f"hash-{seed}",
            **measured,
            "routing_accuracy": 94.0,
            "bytes_up": 3000,
            "bytes_down": 6000,
            "bytes_eval": 1500,
            "skipped_rounds": 1,
            "train_seconds": 3.0,
            "wall_seconds": 10.5,
            "final_state_sha256": "ab" * 32,
            **(summary or {}),
        }
        lines = [{"time": "2026-01-02T03:04:05.678+00:00", **event} for event in run_events(tasks)]
        if ended:
            lines.append({"time": "2026-01-02T03:05:00.000+00:00", "event": "run_finished", "status": end["status"]})
            (folder / "summary.json").write_text(json.dumps(end), encoding="utf-8")
        (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        (folder / "matrix.json").write_text(json.dumps(matrix.to_json()), encoding="utf-8")
        (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return folder

    return write
