"""A method of one's own: the page's code, installed as somebody else's package, and an old Flower strategy as it is."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedstrata.strategies import find
from fedstrata.strategies.base import Setup
from fedstrata.strategies.flower import Stock, StockConfig

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
LONGEST = 40  # lines of code that the page may ask of a reader
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "my_pkg"
version = "1"
[tool.setuptools]
packages = ["my_pkg"]
"""
OLD = '''
from flwr.serverapp.strategy import FedAvg

class Half(FedAvg):
    """Written before fedstrata was heard of: it only changes how replies are put together."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        for name, array in arrays.items():
            arrays[name] = type(array)(array.numpy() / 2)
        return arrays, metrics
'''


def shown() -> str:
    """The complete strategy on the page."""
    section = PAGE.read_text(encoding="utf-8").partition("## Add a strategy")[2].partition("\n## ")[0]
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL) if "class Mine" in block]
    return str(code)


def install(folder: Path) -> Path:
    """`pip install` of a project that holds the page's code and nothing else; returns where it went."""
    package = folder / "project" / "my_pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "my_mod.py").write_text(shown(), encoding="utf-8")
    (package.parent / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command = [*pip, "--disable-pip-version-check", "--target", str(folder / "site"), str(package.parent)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / "site"


def test_the_strategy_on_the_page_is_short() -> None:
    assert len([line for line in shown().splitlines() if line.strip()]) <= LONGEST


def test_the_strategy_on_the_page_beats_finetune_from_an_outside_package(
    federate: Callable[..., object], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path_factory.mktemp("outside")))
    words = ["seed=100", "train.local_epochs=2"]
    mine = federate("my_pkg.my_mod:Mine", *words, "train.lr=2e-3")
    plain = federate("finetune", *words)
    assert importlib.import_module("my_pkg.my_mod").__file__.startswith(sys.path[0])  # type: ignore[union-attr]
    assert mine.summary["last"] > plain.summary["last"]  # type: ignore[attr-defined]
    assert mine.summary["forgetting"] < plain.summary["forgetting"]  # type: ignore[attr-defined]


def test_a_flower_strategy_that_only_defines_aggregate_train_works_unchanged(
    setup: Setup, train_reply: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old_flower.py").write_text(OLD, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    kind = find("old_flower:Half")
    assert issubclass(kind, Stock)
    strategy = kind(StockConfig(name="old_flower:Half", subspaces=1), setup)
    replies = [train_reply(0, [1.0, 2.0, 3.0], count=10), train_reply(1, [4.0, 5.0, 6.0], count=30)]
    strategy.aggregate_train(1, replies)  # type: ignore[arg-type]
    assert strategy.state.adapter.tolist() == [1.625, 2.125, 2.625]  # half of (10 a + 30 b) / 40
    assert strategy.knowledge().adapters[0].tolist() == [1.625, 2.125, 2.625]
