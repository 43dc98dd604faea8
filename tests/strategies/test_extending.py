"""docs/extending.md names what exists."""

import importlib
import re
from pathlib import Path

import pytest

from fedstrata.strategies.base import LocalHalf, Strategy
from fedstrata.strategies.disco import DiscoConfig
from fedstrata.strategies.optimizers import OPTIMIZERS

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", PAGE)


@pytest.mark.parametrize("name", sorted({w for w in CODE if re.fullmatch(r"(core|client|strategies)(\.\w+){2,}", w)}))
def test_every_dotted_name_can_be_imported(name: str) -> None:
    module, attribute = name.split(".")[:2], name.split(".")[2:]
    found = importlib.import_module(".".join(["fedstrata", *module]))
    for part in attribute:
        found = getattr(found, part)


@pytest.mark.parametrize("path", sorted({word for word in CODE if re.fullmatch(r"\w+/\w+\.py", word)}))
def test_every_file_is_there(path: str) -> None:
    assert (Path(__file__).parents[2] / path).is_file()


HOOKS = ["features", "begin", "batch", "loss", "on_gradients", "on_step", "end"]
DOORS = ["begin_stage", "meet", "placement", "configure_train", "aggregate_train", "end_stage"]


def test_every_hook_is_in_its_place() -> None:
    """A hook that is added to the code and not to the page fails here."""
    local, server = (part.partition("##")[0] for part in PAGE.partition("## Order")[2].split("On the server", 1))
    assert sorted(HOOKS) == sorted(name for name in vars(LocalHalf) if not name.startswith("_"))
    assert all(hasattr(Strategy, name) for name in DOORS)
    for names, text in ((HOOKS, local), (DOORS, server)):
        places = [text.index(f"`{name}`") for name in names]
        assert places == sorted(places)


def test_every_option_is_in_the_tables() -> None:
    assert all(f"`{name}`" in PAGE for name in OPTIMIZERS)
    assert all(f"`{name}`" in PAGE for name in DiscoConfig.projectors)
