"""Real images and instructions through the same command: a cut-down stream of two tasks."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from fedstrata import scenarios
from fedstrata.server import configure, launch

TASKS = ("easy_vqa", "sign_digits")


def scenario(folder: Path) -> Path:
    """Two tasks of the packaged recipe `real-images`, a few rows each."""
    packaged = yaml.safe_load((scenarios.LIBRARY / "real-images.yaml").read_text(encoding="utf-8"))
    tree = {
        **packaged,
        "tasks": {name: {**packaged["tasks"][name], "train_rows": 40, "test_rows": 10} for name in TASKS},
        "stages": [[name] for name in TASKS],
        "defaults": {"federation": {"clients": 3, "clients_per_round": 2, "rounds_per_stage": 1}},
    }
    path = folder / "two-streams.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def test_a_stream_of_real_images_runs_end_to_end(real_data: Path, tmp_path: Path) -> None:
    assert "${FEDSTRATA_REAL_DATA}" in scenario(tmp_path).read_text(encoding="utf-8")  # no folder is built in
    words = ["federation.grid=inprocess", "train.local_epochs=1", f"run.dir={tmp_path / 'run'}"]
    folder = launch.run(configure.resolve(str(scenario(tmp_path)), words), Console(quiet=True))
    summary, matrix = (json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "matrix"))
    assert (summary["status"], summary["scenario_hash"] != "") == ("completed", True)
    assert matrix["tasks"] == list(TASKS)
    assert matrix["counts"][-1] == [10, 10]
    kept = [json.loads(line) for line in (folder / "predictions" / "stage-2.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in kept}) == 20
    assert all(line["answer"] for line in kept)


def test_without_the_data_the_recipe_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSTRATA_REAL_DATA", raising=False)
    with pytest.raises(launch.BadInput, match="FEDSTRATA_REAL_DATA is not set"):
        launch.prepare(configure.resolve("real-images", ["federation.grid=inprocess"]))
