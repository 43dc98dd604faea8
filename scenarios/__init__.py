"""What is learned, when, by whom: the door of this room.

`build` makes the `Scenario` of a run, `defaults` and `catalogue` read scenario files without touching any data.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedstrata.core.config import ScenarioSection, read_yaml
from fedstrata.core.errors import BadInput, unknown
from fedstrata.core.seeds import derive
from fedstrata.scenarios import tasks
from fedstrata.scenarios.definition import Definition, read
from fedstrata.scenarios.partition import PARTITIONS, PartitionRule, Shares
from fedstrata.scenarios.stream import Example, ImageSource, Pixels, Scenario, Task, digest

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
    "tuned",
]

LIBRARY = Path(__file__).with_name("library")
VERSION = 1  # of the hash: raised when equal definitions begin to mean other data


def build(section: ScenarioSection, clients: int, seed: int) -> Scenario:
    """The scenario of a run: content and partition are drawn from the run's seed, the same on every machine.

    Raises:
        BadInput: an unknown scenario, a mistake in its file, in its data or in a record of them.
    """
    definition = read(_find(section.name))
    rule = definition.partition if section.beta is None else replace(definition.partition, beta=section.beta)
    folder = definition.folder(section.root)
    where = f"{definition.path}: tasks."
    loaded = [tasks.load(name, spec, folder, seed, where + name) for name, spec in definition.tasks.items()]
    shares = tuple(_shares(task, rule, clients, seed, where) for task, _ in loaded)
    return Scenario(
        name=Path(section.name).stem if _is_path(section.name) else section.name,
        tasks=tuple(task for task, _ in loaded),
        stages=definition.stages,
        assign=definition.assign,
        shares=shares,
        vocabularies=tuple(answers for _, answers in loaded),
        beta=rule.beta if rule.kind == "dirichlet" else None,
        seed=seed,
        hash=_hash(definition, rule, [task for task, _ in loaded], shares, seed),
    )


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


def _shares(task: Task, rule: PartitionRule, clients: int, seed: int, where: str) -> Shares:
    labels = [example.answer for example in task.train]
    try:
        return PARTITIONS[rule.kind](labels, clients, rule, derive(seed, "partition", task.name))
    except BadInput as error:
        raise BadInput(f"{where}{task.name}: {error}") from None


def _hash(
    definition: Definition, rule: PartitionRule, loaded: Sequence[Task], shares: Sequence[Shares], seed: int
) -> str:
    """No path is in it: moving the data or the file does not change what is learned, when, by whom."""
    content = {
        "version": VERSION,
        "tasks": [[task.name, task.metric, digest(task.train), digest(task.val), digest(task.test)] for task in loaded],
        "stages": definition.stages,
        "assign": definition.assign,
        "arrival": asdict(definition.arrival),
        "partition": asdict(rule),
        "shares": shares,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
