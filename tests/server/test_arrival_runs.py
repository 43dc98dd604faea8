"""Runs in which data come early, late or not at all: who trained what is what the scenario says."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fedstrata import scenarios
from fedstrata.core.config import RunConfig
from fedstrata.scenarios.stream import Scenario
from fedstrata.server import configure, launch
from fedstrata.server.participation import participants

WORDS = ["federation.grid=inprocess", "train.local_epochs=1", "train.batch_size=8", "evaluate.split=val"]
ROUNDS = 3
TRACE = [
    {"client": 0, "round": 1, "tasks": ["names"]},
    {"client": 1, "round": 1, "tasks": ["names", "charts"]},
    {"client": 2, "round": 2, "tasks": ["charts"]},
    {"client": 1, "round": 3, "tasks": []},
    {"client": 0, "round": 5, "tasks": ["charts"]},
    {"client": 1, "round": 6, "tasks": ["names"]},
]
RULES: dict[str, dict[str, Any]] = {
    "blurry": {"kind": "blurry", "early": 0.4},
    "asynchronous": {"kind": "asynchronous", "early": 0.2, "lag": 2, "late": 0.34, "leave": 0.34},
    "trace": {"kind": "trace", "file": "trace.json", "repeats": "fresh"},
}


def config(folder: Path, kind: str, strategy: str) -> RunConfig:
    """Two stages of three rounds; five clients hold 60 rows of each of two tasks, three of them take part."""
    (folder / "trace.json").write_text(json.dumps(TRACE))
    drawn = {"train": 60, "val": 10, "test": 10}
    tree = {
        "tasks": {name: {"generate": f"fcit-mini/{name}", **drawn} for name in ("names", "charts")},
        "stages": [["names"], ["charts"]],
        "partition": {"kind": "dirichlet", "beta": 2.0, "min_size": 5},
        "arrival": RULES[kind],
        "defaults": {"federation": {"clients": 5, "clients_per_round": 3, "rounds_per_stage": ROUNDS}},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return configure.resolve(
        str(folder / "mine.yaml"), [*WORDS, f"strategy.name={strategy}", f"run.dir={folder / 'run'}"]
    )


def expected(config: RunConfig, scenario: Scenario, stage: int, round_: int) -> list[tuple[int, list[str], int]]:
    """[(client, tasks, samples)] of a round, by client."""
    drawn = participants(config, scenario, stage, round_)
    told = []
    for position, client in enumerate(drawn):
        tasks = scenario.tasks_of(stage, round_, position, client)
        names = [scenario.tasks[task].name for task in tasks]
        told.append((client, names, scenario.share_size(tasks, client, stage, round_)))
    return sorted(told)


@pytest.mark.parametrize("strategy", ["finetune", "disco"])
@pytest.mark.parametrize("kind", RULES)
def test_a_run_trains_what_the_scenario_says_when_it_says_it(tmp_path: Path, kind: str, strategy: str) -> None:
    asked = config(tmp_path, kind, strategy)
    scenario = scenarios.of(asked)
    folder = launch.run(asked, Console(quiet=True))
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["skipped_rounds"]) == ("completed", 0)
    assert summary["scenario_hash"] == scenario.hash
    assert len(json.loads((folder / "matrix.json").read_text())["scores"]) == 3
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    rounds = {(event["stage"], event["round"]): event for event in events if event["event"] == "round"}
    assert sorted(rounds) == [(stage, round_) for stage in (1, 2) for round_ in range(1, ROUNDS + 1)]
    mixed = 0
    for (stage, round_), event in rounds.items():
        found = [(row["client"], row["tasks"], row["samples"]) for row in event["participants"]]
        wanted = expected(asked, scenario, stage, round_)
        # a method may let a newcomer with little data wait, and nobody else
        assert sorted(found) == wanted if strategy == "finetune" else set(map(str, found)) <= set(map(str, wanted))
        assert found
        mixed += len({tuple(tasks) for _, tasks, _ in found}) > 1 or len(found) < 3
    assert mixed or kind == "blurry"  # the rule made a difference
    assert kind != "blurry" or ["names", "charts"] in [row["tasks"] for row in rounds[1, 1]["participants"]]
