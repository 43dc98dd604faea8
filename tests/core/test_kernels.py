"""`model.matmul`: settled once, by machine and config alone; never where oneDNN is not exact."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedstrata.benchmarks.bases import llama
from fedstrata.core import kernels
from fedstrata.core.config import FederationSection, ModelSection, RunConfig
from fedstrata.core.errors import BadInput


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("wide"), hidden=192, layers=1, vocabulary=16)


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def settled(name: str | Path, error: float, patch: pytest.MonkeyPatch, **more: str) -> str:
    patch.setattr(kernels, "error", lambda: error)
    model = ModelSection(name=str(name), **{"device": "cpu", **more})  # type: ignore[arg-type]
    return kernels.settled(RunConfig(model=model)).model.matmul


def test_auto_is_onednn_for_a_wide_base_where_it_is_exact(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled(wide, 1e-6, monkeypatch) == "onednn"
    assert settled(wide, 4e-3, monkeypatch) == "default"  # it rounds to bfloat16 here
    assert settled(wide, 1e-6, monkeypatch, dtype="bfloat16") == "default"
    assert settled("not-on/this-machine", 1e-6, monkeypatch) == "default"


def test_the_embedded_base_keeps_torchs_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled("tiny", 1e-6, monkeypatch) == "default"


def test_what_is_asked_for_is_kept(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled("tiny", 1.0, monkeypatch, matmul="onednn") == "onednn"
    assert settled(wide, 1e-6, monkeypatch, matmul="default") == "default"


@pytest.mark.parametrize("federation", [FederationSection(grid="flower"), FederationSection(ray_address="10.0.0.1:1")])
def test_other_machines_are_not_probed_from_here(
    wide: Path, monkeypatch: pytest.MonkeyPatch, federation: FederationSection
) -> None:
    monkeypatch.setattr(kernels, "error", lambda: 1e-6)
    config = RunConfig(model=ModelSection(name=str(wide), device="cpu"), federation=federation)
    assert kernels.settled(config).model.matmul == "default"
    assert kernels.settled(replace(config, federation=FederationSection())).model.matmul == "onednn"


def test_a_process_multiplies_as_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "error", lambda: 1e-6)
    for matmul, precision in (("onednn", "medium"), ("default", "highest"), ("onednn", "medium"), ("auto", "highest")):
        kernels.use(ModelSection(device="cpu", matmul=matmul))
        assert torch.get_float32_matmul_precision() == precision


def test_onednn_is_refused_where_it_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "error", lambda: 4e-3)
    with pytest.raises(BadInput, match=r"model.matmul: onednn must multiply float32 .* at most 1e-05 .* got 4.0e-03"):
        kernels.use(ModelSection(device="cpu", matmul="onednn"))
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_probe_leaves_the_process_as_it_was() -> None:
    torch.set_float32_matmul_precision("highest")
    kernels.error.cache_clear()
    assert 0 < kernels.error() < 1e-2
    assert torch.get_float32_matmul_precision() == "highest"
