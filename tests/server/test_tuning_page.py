"""The fairness page keeps its own rules: every command parses, tunes on validation data and stays within the budget."""

from collections import Counter
from pathlib import Path

import pytest

from fedstrata.server.cells import cells
from fedstrata.server.configure import split_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tuning.md"
BUDGET = 6
LINES = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("fedstrata sweep ")]


@pytest.mark.parametrize("line", LINES)
def test_a_command_tunes_on_val_with_high_seeds_within_the_budget(line: str) -> None:
    found = cells(*split_recipe(line.partition(" --dir")[0].split()[2:]))
    assert {cell.config.evaluate.split for cell in found} == {"val"}
    assert min(cell.config.seed for cell in found) >= 100
    assert max(Counter(cell.config.strategy.name for cell in found).values()) <= BUDGET


def test_the_page_has_commands() -> None:
    assert len(LINES) >= 10
