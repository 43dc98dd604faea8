"""A run that was stopped goes on as if it had not been."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedstrata.core.errors import BadInput, Interrupted
from fedstrata.server import configure, launch
from fedstrata.server.federation import Federation

WORDS = ["federation.grid=inprocess", "train.local_epochs=1", "evaluate.split=val", "federation.rounds_per_stage=2"]


def config(folder: Path, *words: str) -> Any:
    return configure.resolve("fcit-mini-short", [*WORDS, f"run.dir={folder}", *words])


def final(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


@pytest.mark.parametrize("strategy", ["disco", "oracle", "joint"])
def test_an_interrupted_run_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    quiet = Console(quiet=True)
    whole = launch.run(config(tmp_path / "whole", f"strategy.name={strategy}"), quiet)
    real = Federation._round

    def stop_in_stage_two(self: Federation, stage: int, round_: int) -> None:
        if (stage, round_) == (2, 2):
            raise KeyboardInterrupt
        real(self, stage, round_)

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_round", stop_in_stage_two)
        with pytest.raises(Interrupted, match="fedstrata resume"):
            launch.run(config(tmp_path / "cut", f"strategy.name={strategy}"), quiet)
    assert final(tmp_path / "cut")["status"] == "interrupted"
    cut = launch.resume(tmp_path / "cut", quiet)
    for key in ("status", "final_state_sha256", "last", "avg", "routing_accuracy"):
        assert final(cut)[key] == final(whole)[key]
    assert (cut / "matrix.json").read_text() == (whole / "matrix.json").read_text()
    with pytest.raises(BadInput, match="nothing to resume"):
        launch.resume(cut, quiet)


def test_a_run_that_skips_most_of_its_rounds_has_not_completed(tmp_path: Path) -> None:
    with pytest.raises(launch.FedstrataError, match="4 of 4 rounds were skipped"):
        launch.run(config(tmp_path / "run", "strategy.min_open=100000"), Console(quiet=True))
    assert final(tmp_path / "run")["status"] == "failed"
    assert final(tmp_path / "run")["skipped_rounds"] == 4
