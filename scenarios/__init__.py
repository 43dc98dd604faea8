"""What is learned, when, by whom: the door of this room.

`build` makes the `Scenario` of a run, `defaults` and `catalogue` read scenario files without touching any data.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedstrata.core.config import RunConfig, ScenarioSection, read_yaml
from fedstrata.core.errors import BadInput, unknown
from fedstrata.scenarios.building import assemble
from fedstrata.scenarios.definition import read
from fedstrata.scenarios.stream import Example, ImageSource, Pixels, Scenario, Task

__all__ = [
    "Example",
    "ImageSource",
    "Pixels",
    "Scenario",
    "Task",
    "build",
    "catalogue",
    "defaults",
    "is_scenario_file",
    "of",
    "tuned",
]

LIBRARY = Path(__file__).with_name("library")


def of(config: RunConfig, strict: bool = True) -> Scenario:
    """The scenario of a run: content, partition and arrival are drawn from its seed, the same on every machine.

    Args:
        strict: refuse missing pictures; else they are listed in each task's `missing`.

    Raises:
        BadInput: an unknown scenario, a mistake in its file, in its data or in a record of them.
    """
    federation = config.federation
    return build(config.scenario, federation.clients, config.seed, federation.rounds_per_stage, strict)


def build(section: ScenarioSection, clients: int, seed: int, rounds: int = 1, strict: bool = True) -> Scenario:
    """`of` for the parts of a config that decide a scenario; `rounds` are those of a stage."""
    definition = read(_find(section.name))
    rule = definition.partition if section.beta is None else replace(definition.partition, beta=section.beta)
    name = Path(section.name).stem if _is_path(section.name) else section.name
    return assemble(name, definition, section.root, rule, section.beta, clients, seed, rounds, strict)


def defaults(name: str) -> dict[str, Any]:
    """The config keys that the scenario suggests, a layer for `core.config.build`; reads no data."""
    return {section: dict(keys) for section, keys in read(_find(name)).defaults.items()}


def tuned(name: str, strategy: str) -> dict[str, Any]:
    """What the scenario suggests for one strategy beyond `defaults`: what was chosen for it on validation data."""
    return {section: dict(keys) for section, keys in read(_find(name)).tuned.get(strategy, {}).items()}


def catalogue() -> dict[str, str]:
    """Packaged scenario → what it is: the comment at the top of its file, up to the first `Word:`."""
    return {path.stem: _description(path) for path in sorted(LIBRARY.glob("*.yaml"))}


def is_scenario_file(path: str | Path) -> bool:
    """Whether it is a YAML file with a `tasks` key; never raises for what is on the disk."""
    try:
        return "tasks" in read_yaml(Path(path))
    except (BadInput, ValueError, TypeError):
        return False


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


def _find(name: str) -> Path:
    if _is_path(name):
        return Path(name)
    if name not in catalogue():
        raise unknown("scenario.name", name, catalogue())
    return LIBRARY / f"{name}.yaml"


def _description(path: Path) -> str:
    found = re.match(r"(?:#(?! ?\w+:).*\n)+", path.read_text(encoding="utf-8"))
    return " ".join(line.lstrip("# ") for line in found[0].splitlines()) if found else ""
