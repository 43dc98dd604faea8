"""`fedstrata list`: strategies, scenarios, models."""

import re

from rich.console import Console
from rich.table import Table

from fedstrata import scenarios
from fedstrata.core.errors import unknown
from fedstrata.server import methods

MODELS = {
    "tiny": "the embedded base: a 0.9 M-parameter LLaVA that ships with fedstrata; CPU, no download",
    "FOLDER": "a local LLaVA or causal language model in the transformers layout",
    "llava-hf/llava-1.5-7b-hf": "any LLaVA or causal language model of a model hub by its name (downloads it)",
}


def show(what: str, console: Console) -> None:
    """Prints one catalogue or all. Raises `BadInput` for another word."""
    tables = {"strategies": strategies, "scenarios": lambda: scenarios.catalogue().items(), "models": MODELS.items}
    if what and what not in tables:
        raise unknown("list", what, tables)
    for name, rows in tables.items():
        if what in ("", name):
            columns = methods.COLUMNS if name == "strategies" else ("name", "about")
            table = Table(*columns, title=name, title_justify="left")
            table.columns[0].no_wrap = True
            for row in rows():
                table.add_row(*row)
            console.print(table)


def strategies() -> list[tuple[str, ...]]:
    """What each method is, needs and costs; a paper without its link."""
    return [tuple(re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cell) for cell in row.cells()) for row in methods.methods()]
