"""`fedstrata list`: strategies, scenarios, models."""

import inspect

from rich.console import Console
from rich.table import Table

from fedstrata import scenarios
from fedstrata.core.errors import unknown
from fedstrata.strategies import STRATEGIES

MODELS = {
    "tiny": "the embedded base: a 0.9 M-parameter LLaVA that ships with fedstrata; CPU, no download",
    "FOLDER": "a local LLaVA or causal language model in the transformers layout",
    "llava-hf/llava-1.5-7b-hf": "any LLaVA or causal language model of a model hub by its name (downloads it)",
}


def show(what: str, console: Console) -> None:
    """Prints one catalogue or all. Raises `BadInput` for another word."""
    tables = {"strategies": strategies(), "scenarios": scenarios.catalogue(), "models": MODELS}
    if what and what not in tables:
        raise unknown("list", what, tables)
    for name, rows in tables.items():
        if what in ("", name):
            table = Table("name", "about", title=name, title_justify="left")
            for key, about in rows.items():
                table.add_row(key, about)
            console.print(table)


def strategies() -> dict[str, str]:
    """Name → first line of its class, and whether it uses task identity."""
    rows = {}
    for name, kind in STRATEGIES.items():
        first = (inspect.getdoc(kind) or "").partition("\n")[0]
        rows[name] = f"{first} Uses task identity: {'yes' if kind.uses_task_identity else 'no'}."
    return rows
