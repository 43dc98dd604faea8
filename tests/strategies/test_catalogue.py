"""The catalogue of methods, and the door for methods from outside."""

from pathlib import Path

import pytest
from flwr.serverapp.strategy import FedMedian

from fedstrata import scenarios
from fedstrata.core import config as configuration
from fedstrata.core.errors import BadInput
from fedstrata.server import configure
from fedstrata.server.results import flatten
from fedstrata.strategies import STRATEGIES, find
from fedstrata.strategies.base import Strategy
from fedstrata.strategies.flower import Stock

OUTSIDE = """
from fedstrata.strategies.finetune import Finetune

class Mine(Finetune):
    "A method of somebody else."

class NoStrategy:
    pass

value = 3
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    package = tmp_path / "strangers_package"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "strangers_module.py").write_text(OUTSIDE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "strangers_package.strangers_module"


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_method_of_the_catalogue_is_found_and_described(name: str) -> None:
    kind = find(name)
    assert kind is STRATEGIES[name]
    assert issubclass(kind, Strategy)
    assert kind.__doc__
    assert kind.config_type().name


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_method_of_the_catalogue_has_a_recipe(name: str) -> None:
    """What was chosen for it on val, which `fedstrata run fcit-mini-small strategy.name=...` takes."""
    recipe = scenarios.tuned("fcit-mini-small", name)
    told = flatten(configuration.to_dict(configure.resolve("fcit-mini-small", [f"strategy.name={name}"])))
    assert "lr" in recipe["train"]
    assert {key: told[key] for key in flatten(recipe)} == flatten(recipe)


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(BadInput, match=r"strategy\.name: unknown 'dsico'; did you mean 'disco'\? known: .*disco, "):
        find("dsico")


def test_a_class_from_outside_needs_no_entry(outside: str) -> None:
    kind = find(f"{outside}:Mine")
    assert issubclass(kind, Strategy)
    assert kind.__name__ == "Mine"
    assert kind.__module__ == outside


@pytest.mark.parametrize("attribute", ["NoStrategy", "value"])
def test_what_is_no_strategy_is_bad_input(outside: str, attribute: str) -> None:
    with pytest.raises(BadInput, match=rf"'{outside}:{attribute}' is no subclass of"):
        find(f"{outside}:{attribute}")


@pytest.mark.parametrize(
    "name", ["no_such_module_here:Mine", "fedstrata.strategies:Nothing", ":Mine", ".relative:Mine"]
)
def test_what_cannot_be_loaded_is_bad_input(name: str) -> None:
    with pytest.raises(BadInput, match=r"strategy\.name: cannot load"):
        find(name)


def test_a_stock_flower_class_is_wrapped_under_its_own_name() -> None:
    kind = find("flwr.serverapp.strategy:FedMedian")
    assert issubclass(kind, Stock)
    assert kind.flower_type is FedMedian
    assert kind.__name__ == "FedMedian"
