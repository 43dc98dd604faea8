"""What a run did to what the base could do before, and to tasks that it never trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.pretraining import pretraining_task
from fedstrata.server import beyond, configure, launch

Summary = dict[str, Any]
ELSEWHERE = """
tasks:
  names: {generate: fcit-mini/names, train: 1, val: 0, test: 5}
  texture: {generate: pretraining/texture, train: 1, val: 0, test: 12}
  backdrop: {generate: pretraining/backdrop, train: 1, val: 0, test: 12}
stages: [[names, texture, backdrop]]
assign: homogeneous
partition: {kind: by-task, min_size: 0}
arrival: {kind: stages}
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Summary]:
    """fcit-mini-short with one round a stage, and what its summary says."""
    torch.set_num_threads(1)
    (tmp_path / "elsewhere.yaml").write_text(ELSEWHERE, encoding="utf-8")

    def make(*words: str) -> Summary:
        small = ["federation.grid=inprocess", "federation.rounds_per_stage=1", "train.local_epochs=1"]
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        config = configure.resolve("fcit-mini-short", [*small, f"run.dir={folder}", *words])
        launch.run(config, Console(quiet=True))
        return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))

    return make


def test_what_was_not_trained_is_as_the_base_and_what_forgets_is_below(
    run: Callable[..., Summary], tmp_path: Path
) -> None:
    elsewhere = f"evaluate.pretrained={tmp_path / 'elsewhere.yaml'}"
    still = run(elsewhere, "strategy.name=finetune", "train.lr=1e-12")
    assert still["pretrained_before"] > 50  # the base was trained on both
    assert still["pretrained"] == still["pretrained_before"]
    assert "unseen" not in still
    moved = run(elsewhere, "strategy.name=finetune", "train.lr=0.02")
    assert moved["pretrained_before"] == still["pretrained_before"]
    assert moved["pretrained"] < moved["pretrained_before"]
    assert moved["bytes_eval"] == still["bytes_eval"]


def test_a_method_that_routes_by_task_identity_has_no_value(run: Callable[..., Summary], tmp_path: Path) -> None:
    told = run(f"evaluate.unseen={tmp_path / 'elsewhere.yaml'}", "strategy.name=oracle")
    assert (told["unseen"], "pretrained" in told) == (None, False)
    assert told["unseen_before"] > 50


@pytest.mark.parametrize("clients", [4, 20])
def test_the_packaged_scenarios_fit_a_run_of_any_size(clients: int) -> None:
    both = ["evaluate.pretrained=fcit-mini-pretraining", "evaluate.unseen=fcit-mini-unseen"]
    beyond.check(configure.resolve("fcit-mini-short", [*both, f"federation.clients={clients}"]))


def test_a_scenario_without_another_task_is_refused_before_the_run(run: Callable[..., Summary], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"evaluate.unseen: fcit-mini-short must have a task that the run's scenario"):
        run("evaluate.unseen=fcit-mini-short", f"run.dir={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()


def test_pretraining_tasks_are_drawn_from_the_seed() -> None:
    first, again = (pretraining_task("where", 3, 1, 2, 9) for _ in range(2))
    assert [row.question for row in first.test] == [row.question for row in again.test]
    assert (len(first.train), len(first.val), len(first.test)) == (1, 2, 9)
    assert {row.id.split("-")[0] for row in first.test} == {"where"}
    other = pretraining_task("where", 4, 1, 2, 9)
    assert [row.answer for row in other.test] != [row.answer for row in first.test]
