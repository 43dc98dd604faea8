"""The table of methods: computed, the same in the README, and of the model that it speaks of."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from fedstrata.core import shapes
from fedstrata.server import catalogue, configure, methods
from fedstrata.strategies import STRATEGIES

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_table_is_the_catalogues() -> None:
    """To mend it: put what `methods.markdown(methods.methods())` gives between the two markers."""
    found = re.search(
        r"<!-- strategies -->\n(.*?)\n<!-- /strategies -->", README.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found is not None, "README.md: the markers around the table of strategies are gone"
    assert found[1].splitlines() == methods.markdown(methods.methods()).splitlines()


def test_the_embedded_bases_layers_are_those_that_a_run_adapts() -> None:
    adapted, read = shapes.layout(configure.resolve("", [])), methods.embedded()
    assert sorted(size for _, *size in read.modules) == sorted(size for _, *size in adapted.modules)
    assert read.size(8) == adapted.size(8) == 39_168


def test_the_sizes_are_those_of_the_default_scenario() -> None:
    from fedstrata import scenarios

    config = configure.resolve("", [])
    assert scenarios.of(config).units == methods.TASKS


@pytest.mark.parametrize(
    ("name", "grows", "upload"),
    [
        ("finetune", 0, 8 * 4 * 39_168),
        ("disco", 39_168, 4 * 39_168),
        ("scaffold", 0, 2 * 8 * 4 * 39_168),
        ("ewc", 0, 8 * 4 * 39_168 * (1 + 1 / 8)),  # importances in one round of eight
    ],
)
def test_costs_by_hand(name: str, grows: int, upload: float) -> None:
    row = methods.method(name, STRATEGIES[name], configure.resolve("", []))
    assert (row.grows, row.upload) == (grows, upload)


def test_what_a_method_needs_is_what_it_declares() -> None:
    rows = {row.name: row.needs for row in methods.methods()}
    assert rows["finetune"] == "–"
    assert rows["joint"] == "all tasks at once"
    assert rows["oracle"] == "task identity"
    assert rows["disco"] == "text encoder"
    assert rows["hide"] == "task identity, text encoder"
    assert rows["replay"] == "rehearsal"


def test_a_listing_has_every_method_with_its_paper_and_no_links() -> None:
    out = io.StringIO()
    catalogue.show("strategies", Console(file=out, width=200))
    lines = out.getvalue().splitlines()
    for name, kind in STRATEGIES.items():
        line = next(line for line in lines if f" {name} " in line)
        assert kind.facts.paper in line
    assert "](" not in out.getvalue()
