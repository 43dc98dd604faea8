"""A run writes down how it multiplies, sends it to its clients, and goes on with it."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from fedstrata.benchmarks.bases import llama
from fedstrata.benchmarks.e2e import scenario
from fedstrata.core import kernels
from fedstrata.core.errors import BadInput
from fedstrata.server import configure, launch

QUIET = Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def run(folder: Path, *words: str) -> Path:
    base = llama(folder / "base", hidden=192, layers=1, vocabulary=64)
    given = [
        f"model.name={base}",
        "model.device=cpu",
        "model.max_new_tokens=1",
        "strategy.name=finetune",
        "federation.grid=inprocess",
        "federation.clients=2",
        "federation.clients_per_round=1",
        "federation.rounds_per_stage=1",
        "train.local_epochs=1",
        f"run.dir={folder / 'run'}",
    ]
    return launch.run(configure.resolve(str(scenario(folder, 2)), [*given, *words]), QUIET)


def saved(folder: Path) -> str:
    return str(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["model"]["matmul"])


def test_auto_is_written_down_as_what_it_came_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "error", lambda: 1e-6)
    folder = run(tmp_path)
    assert saved(folder) == "onednn"
    assert torch.get_float32_matmul_precision() == "medium"  # what the client was sent
    monkeypatch.setattr(kernels, "error", lambda: 4e-3)  # the run is carried to another machine
    with pytest.raises(BadInput, match="model.matmul: onednn must multiply float32"):
        launch.resume(folder, QUIET, from_stage=1)


def test_where_onednn_rounds_auto_is_torchs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "error", lambda: 4e-3)
    assert saved(run(tmp_path)) == "default"
    assert torch.get_float32_matmul_precision() == "highest"
