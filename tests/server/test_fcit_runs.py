"""The four FCIT settings end to end on a miniature of the published files: finetune and DISCO on the tiny base."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from fedstrata.server import configure, launch

WORDS = [
    "federation.rounds_per_stage=1",
    "federation.grid=inprocess",
    "model.name=tiny",
    "model.text_encoder=base",
    "model.dtype=float32",
    "model.system=",  # the tiny base has no system role
    "train.lr=2e-3",
]
SHORT = {"evaluate.shard=100"}


@pytest.mark.parametrize("strategy", ["finetune", "disco"])
@pytest.mark.parametrize("setting", ["task-hom", "task-het", "cap-hom", "cap-het"])
def test_a_setting_runs_end_to_end(fcit_root: Path, tmp_path: Path, setting: str, strategy: str) -> None:
    words = [f"scenario.root={fcit_root}", f"strategy.name={strategy}", f"run.dir={tmp_path / 'run'}", *WORDS, *SHORT]
    folder = launch.run(configure.resolve(f"fcit-{setting}", words), Console(quiet=True))
    summary = json.loads((folder / "summary.json").read_text())
    matrix = json.loads((folder / "matrix.json").read_text())
    stages, tasks = (8, 8) if setting.startswith("task") else (4, 12)
    assert (summary["status"], summary["skipped_rounds"]) == ("completed", 0)
    assert (len(matrix["scores"]), len(matrix["tasks"])) == (stages + 1, tasks)
    assert matrix["metrics"][matrix["tasks"].index("Flickr30k")] == "caption_average"
    assert all(matrix["seen"][-1])
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    trained = [row for event in events if event["event"] == "round" for row in event["participants"]]
    most = 5 * stages
    assert len(trained) == most if strategy == "finetune" else 0.8 * most <= len(trained) <= most  # small ones may wait
    scored = [event for event in events if event["event"] == "stage_scored"]
    assert set(scored[-1]["beside"]["FigureQA"]) == {"substring"}
