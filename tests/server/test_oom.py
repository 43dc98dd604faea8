"""Memory that runs out in mid-run: smaller cohorts from there on, written down, kept by a resume."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fedstrata.client import training
from fedstrata.client.training import Job, Trained
from fedstrata.core.errors import BadInput, Interrupted
from fedstrata.core.metrics import AccuracyMatrix
from fedstrata.server import checkpoint, configure, launch
from fedstrata.server.federation import Federation
from fedstrata.server.progress import Progress
from fedstrata.server.runfolder import RunFolder

QUIET = Console(quiet=True)
WORDS = ["federation.grid=inprocess", "train.local_epochs=1", "evaluate.split=val", "federation.rounds_per_stage=2"]


def config(folder: Path) -> Any:
    words = [*WORDS, f"run.dir={folder}", "federation.clients_per_round=4", "federation.cohort_size=4"]
    return configure.resolve("fcit-mini-short", words)


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))


def memory_for(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """From here on cohorts of more than `most` clients find no memory; the sizes that were tried."""
    real, sizes = training.train, list[int]()

    def train(base: Any, jobs: Sequence[Job], *args: Any, **kwargs: Any) -> list[Trained]:
        sizes.append(len(jobs))
        if len(jobs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(base, jobs, *args, **kwargs)

    monkeypatch.setattr(training, "train", train)
    return sizes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch.run(config(tmp_path_factory.mktemp("whole") / "run"), QUIET)


def state(folder: Path) -> dict[str, np.ndarray]:
    return dict(checkpoint.require_newest(folder).parts.tensors)


def test_a_run_whose_cohorts_do_not_fit_ends_as_it_would_have_with_smaller_ones_from_there_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = memory_for(monkeypatch, 2)
    run = launch.run(config(tmp_path / "run"), QUIET)
    assert sizes == [4, 2, 2] + 3 * [2, 2]  # tried once
    told = [event for event in RunFolder(run).events() if event["event"] == "cohort_shrunk"]
    assert [{k: event[k] for k in ("from", "to", "stage", "round")} for event in told] == [
        {"from": 4, "to": 2, "stage": 1, "round": 1}
    ]
    assert (summary(run)["cohort_size"], summary(run)["cohort_shrunk"]) == (2, 1)
    assert (summary(whole)["cohort_size"], summary(whole)["cohort_shrunk"]) == (4, 0)
    assert summary(run)["status"] == "completed"
    assert summary(run)["rejected"] == {}
    before, after = state(whole), state(run)
    assert set(before) == set(after)
    for name, value in before.items():  # equal to rounding, which training spreads
        assert np.linalg.norm(after[name] - value) <= 2e-2 * np.linalg.norm(value), name


def test_a_resumed_run_goes_on_with_the_smaller_cohorts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Federation._round

    def stop(self: Federation, stage: int, round_: int) -> None:
        if stage == 2:
            raise KeyboardInterrupt
        real(self, stage, round_)

    with monkeypatch.context() as patch:
        memory_for(patch, 3)
        patch.setattr(Federation, "_round", stop)
        with pytest.raises(Interrupted):
            launch.run(config(tmp_path / "run"), QUIET)
    assert summary(tmp_path / "run")["cohort_size"] == 2
    with monkeypatch.context() as patch:
        sizes = memory_for(patch, 3)
        launch.resume(tmp_path / "run", QUIET)
    assert sizes == [2, 2, 2, 2]
    with monkeypatch.context() as patch:
        whole = memory_for(patch, 3)
        launch.run(config(tmp_path / "again"), QUIET)
    assert whole == [4, 2, 2] + 3 * [2, 2]
    for key in ("final_state_sha256", "cohort_size", "cohort_shrunk", "last"):
        assert summary(tmp_path / "run")[key] == summary(tmp_path / "again")[key], key


def test_a_run_for_which_one_client_is_too_much_ends_and_says_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_for(monkeypatch, 0)
    with pytest.raises(BadInput, match=r"train\.micro_batch.*train\.checkpointing"):
        launch.run(config(tmp_path / "run"), QUIET)
    assert summary(tmp_path / "run")["status"] == "failed"


def progress() -> Progress:
    return Progress(AccuracyMatrix((), (), ()))


def test_the_smallest_that_was_reported_counts_whatever_the_order() -> None:
    told = [{"cohort": 4, "peak": 5}, {}, {"cohort": 2, "peak": 9}, {"cohort": 3}]
    for order in (told, told[::-1]):
        found = progress().fit(order, 8)
        assert (found.cohort, found.shrunk, found.peak) == (2, 1, 9)
        assert found.fit([{"peak": 1}], 2) == found
    assert Progress.from_json(found.to_json()) == found


@pytest.mark.parametrize("words", [{}, {"cohort": 0}, {"cohort": 8}, {"cohort": "2"}, {"cohort": True}, {"peak": "9"}])
def test_words_about_memory_that_make_no_sense_count_not(words: dict[str, Any]) -> None:
    assert progress().fit([words], 8) == progress()


def test_progress_of_before_there_were_cohorts_in_it_is_read() -> None:
    old = {key: value for key, value in progress().to_json().items() if key not in ("cohort", "shrunk", "peak")}
    assert Progress.from_json(old) == progress()
