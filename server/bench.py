"""`fedstrata bench NAME`: one side-by-side measurement and its table."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from fedstrata.core.errors import BadInput, unknown

PACKAGE = "fedstrata.benchmarks"  # named, not imported: benchmarks stand above the server


def names() -> dict[str, str]:
    """Every benchmark and what it compares."""
    return dict(importlib.import_module(PACKAGE).NAMES)


def measure(name: str) -> dict[str, Any]:
    """Runs one benchmark; its result as `--json` writes it.

    Raises:
        BadInput: an unknown name, or what the benchmark needs is not there.
    """
    if name not in names():
        raise unknown("bench", name, names())
    found = _module(name).bench().json()
    return dict(found)


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"{PACKAGE}.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        raise BadInput(f"bench {name}: needs the package {error.name}: pip install 'fedstrata[bench]'") from error


def rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(compared with, measured, aimed at, reached) of every ratio and ceiling."""
    targets, found = result["targets"], []
    for name, ratio in result["ratios"].items():
        least = targets.get(name)
        aim = "" if least is None else f"≥ {least:g} ×"
        found.append((name, f"{ratio:.3g} ×", aim, _mark(least is None or ratio >= least, aim)))
    for name, value in result["limits"].items():
        most = targets.get(name)
        aim = "" if most is None else f"≤ {most:g}"
        found.append((name, f"{value:.4g}", aim, _mark(most is None or value <= most, aim)))
    return found


def _mark(reached: bool, aim: str) -> str:
    return ("yes" if reached else "NO") if aim else ""


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints the table, what was equal and the notes."""
    table = Table(title=f"{result['name']}: {result['what']}", title_justify="left")
    for heading in (f"against ({result['clock']})", "measured", "target", "reached"):
        table.add_column(heading)
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    for line in (*(f"equal: {key}: {value}" for key, value in result["equal"].items()), *result["notes"]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    machine = result["machine"]
    console.print(f"{machine['processor']}, {machine['cores']} cores, load {machine['load']:.1f}", highlight=False)
