"""The scenario file: a strict YAML schema, read and checked without touching any data."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fedstrata.core.config import RunConfig, read_yaml, require
from fedstrata.core.errors import BadInput, unknown
from fedstrata.core.scoring import SCORERS
from fedstrata.scenarios.arrival import ArrivalRule
from fedstrata.scenarios.fcit_tables import FcitRule
from fedstrata.scenarios.formats import FORMATS
from fedstrata.scenarios.jsonfile import is_folder
from fedstrata.scenarios.partition import PartitionRule
from fedstrata.scenarios.schema import expect, fill, listing, mapping

Lists = tuple[tuple[int, ...], ...]
Assign = tuple[Lists, ...]
MOST_GENERATED = 20_000  # a split; the generators draw until they have as many different examples
KEYS = ("tasks", "stages", "assign", "partition", "arrival", "fcit", "root", "defaults", "tuned")
OURS = ("tasks", "stages", "assign", "partition", "arrival")  # what FCIT's own files say
NOT_DEFAULTS = ("seed", "run")  # they belong to a run, never to a scenario


@dataclass(frozen=True)
class GeneratedTask:
    """A task drawn from the run's seed: `generate` names generator and task; the counts are examples a split."""

    generate: str
    train: int = 1200
    val: int = 100
    test: int = 150
    metric: str = "exact_match"

    def __post_init__(self) -> None:
        for key, least in (("train", 1), ("val", 0), ("test", 1)):
            count = getattr(self, key)
            require(least <= count <= MOST_GENERATED, key, f"between {least} and {MOST_GENERATED:,}", count)
        _check_name("metric", self.metric, tuple(SCORERS))


@dataclass(frozen=True)
class FileTask:
    """A task of instruction files, or of a Hugging Face dataset.

    Without `val`, rows of `train` are held out; where it is an empty text, none are.

    With `dataset` (a hub name or a folder), `train`, `test` and `val` name its splits.
    """

    train: str
    test: str
    val: str | None = None
    images: str | None = None  # a folder or a .zip file
    format: str = "llava"
    metric: str = "exact_match"
    beside: list[str] = field(default_factory=list)  # further metrics, reported beside `metric`
    suffix: str = ""
    train_rows: int | None = None
    test_rows: int | None = None
    dataset: str | None = None
    subset: str | None = None  # a dataset's configuration
    fields: dict[str, str] = field(default_factory=dict)  # format `fields`: question, answer and image → record's key
    answers: list[str] = field(default_factory=list)  # only rows with one of these answers; empty: all
    where: dict[str, str] = field(default_factory=dict)  # only records whose fields have these values

    def __post_init__(self) -> None:
        for key in ("train_rows", "test_rows"):
            count = getattr(self, key)
            require(count is None or count >= 1, key, "at least 1", count)
        _check_name("format", self.format, tuple(FORMATS))
        for metric in (self.metric, *self.beside):
            _check_name("metric", metric, tuple(SCORERS))
        for key in self.fields:
            _check_name("fields", key, ("question", "answer", "image"))
        good = (self.format == "fields") == bool(self.fields)
        require(good, "fields", "there with format: fields, and only then", self.fields)


@dataclass(frozen=True)
class HeldTask:
    """A task of which the server holds no data: each client has a folder of its own (`held: clients`)."""

    held: str
    metric: str = "exact_match"
    beside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_name("held", self.held, ("clients",))
        for metric in (self.metric, *self.beside):
            _check_name("metric", metric, tuple(SCORERS))
            rule = "one that adds up over clients: this one needs all references, and each client has its own alone"
            require(not SCORERS[metric].needs_corpus, "metric", rule, metric)


TaskSpec = GeneratedTask | FileTask | HeldTask


@dataclass(frozen=True)
class Definition:
    """A checked scenario file. `stages` and `assign` hold indices into `tasks`, as in `stream.Scenario`.

    With `fcit`, tasks, stages and partition come from the published files.
    """

    path: Path
    tasks: Mapping[str, TaskSpec] = field(default_factory=dict)
    stages: Lists = ()
    assign: Assign | None = None
    partition: PartitionRule = field(default_factory=PartitionRule)
    arrival: ArrivalRule = field(default_factory=ArrivalRule)
    fcit: FcitRule | None = None
    root: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Whether the clients hold the data; then they do of all tasks."""
        return any(isinstance(task, HeldTask) for task in self.tasks.values())

    def folder(self, override: str = "") -> Path:
        """Where relative paths start: `override` (scenario.root), else the file's `root`, else the file's own folder.

        Raises:
            BadInput: there is no such folder, or `root` names an environment variable that is not set.
        """
        key = "scenario.root" if override else f"{self.path}: root"
        folder = Path(override) if override else self.path.parent / _expand(self.root, key)
        expect(is_folder(folder), key, "an existing folder", str(folder))
        return folder


def read(path: Path, own: bool = False) -> Definition:
    """Reads a scenario file. Raises `BadInput` with the file, the key, the rule, what came and near matches.

    own: it is one client's, who may have nothing new in a stage (`[]`).
    """
    try:
        tree = mapping(read_yaml(path), f"{path}: top level")
    except (ValueError, TypeError) as error:  # YAML takes 2001-99-99 for a date, which there is not
        raise BadInput(f"{path}: not a readable YAML file: {error}") from error
    for key in tree:
        _check_name(f"{path}: {key}", key, KEYS)
    root = tree.get("root", "")
    expect(isinstance(root, str), f"{path}: root", "a text", root)
    return Definition(
        path=path,
        root=root,
        defaults=_defaults(tree.get("defaults", {}), f"{path}: defaults"),
        tuned=_tuned(tree.get("tuned", {}), f"{path}: tuned"),
        **(_published(tree, path) if "fcit" in tree else _own(tree, path, own)),
    )


def _published(tree: Mapping[str, Any], path: Path) -> dict[str, Any]:
    for key in OURS:
        if key in tree:
            raise BadInput(f"{path}: {key}: must be left out beside fcit, whose files say it")
    return {"fcit": fill(FcitRule, tree["fcit"], f"{path}: fcit")}


def _own(tree: Mapping[str, Any], path: Path, own: bool) -> dict[str, Any]:
    tasks = _tasks(tree.get("tasks"), f"{path}: tasks")
    assign = _assign(tree.get("assign", "homogeneous"), tuple(tasks), f"{path}: assign")
    arrival = fill(ArrivalRule, tree.get("arrival", {}), f"{path}: arrival")
    # positions say who trains what, so the clock can say neither who nor when
    good = assign is None or (arrival.kind == "stages" and arrival.repeats == "same")
    expect(good, f"{path}: arrival", "kind stages with repeats same beside heterogeneous assign", arrival.kind)
    if any(isinstance(task, HeldTask) for task in tasks.values()):
        for key in ("assign", "partition", "arrival"):
            expect(key not in tree, f"{path}: {key}", "left out where clients hold the data, and say it", tree.get(key))
    return {
        "tasks": tasks,
        "stages": _stages(tree.get("stages"), assign, tuple(tasks), f"{path}: stages", own),
        "assign": assign,
        "partition": fill(PartitionRule, tree.get("partition", {}), f"{path}: partition"),
        "arrival": arrival,
    }


def _tuned(tree: object, where: str) -> Mapping[str, Mapping[str, Any]]:
    """{strategy: defaults}; the names of strategies are not known in this room."""
    return {name: _defaults(block, f"{where}.{name}") for name, block in mapping(tree, where).items()}


def _tasks(tree: object, where: str) -> dict[str, TaskSpec]:
    blocks = mapping(tree, where)
    expect(len(blocks) > 0, where, "a mapping with at least one task", tree)
    tasks = {name: _task(block, f"{where}.{name}") for name, block in blocks.items()}
    held = sum(isinstance(task, HeldTask) for task in tasks.values())
    expect(held in (0, len(tasks)), where, "all held by clients or none", f"{held} of {len(tasks)}")
    return tasks


def _task(block: object, where: str) -> TaskSpec:
    keys = mapping(block, where)
    if "held" in keys:
        return fill(HeldTask, keys, where)
    return fill(GeneratedTask, keys, where) if "generate" in keys else fill(FileTask, keys, where)


def _assign(tree: object, names: tuple[str, ...], where: str) -> Assign | None:
    """Per stage, per position: a task, or a list of tasks."""
    if tree == "homogeneous":
        return None
    rule = "homogeneous or a list of lists of task names"
    stages = [listing(entry, where, rule) for entry in listing(tree, where, rule)]
    return tuple(
        tuple(
            tuple(_index(name, names, where) for name in (place if isinstance(place, list) else [place]))
            for place in stage
        )
        for stage in stages
    )


def _stages(tree: object, assign: Assign | None, names: tuple[str, ...], where: str, own: bool) -> Lists:
    """With `assign` the stages may be left out: those are the tasks that it gives out, and must be."""
    given = tuple(tuple(dict.fromkeys(task for place in stage for task in place)) for stage in assign or ())
    if tree is None and assign is not None:
        return tuple(tuple(sorted(stage)) for stage in given)
    stages = _lists(tree, names, where, "a list of lists of task names, one list a stage", own)
    for number, stage in enumerate(stages, 1):
        expect(len(set(stage)) == len(stage), f"{where}: stage {number}", "a list without repeats", _join(stage, names))
    if assign is not None and [set(stage) for stage in stages] != [set(stage) for stage in given]:
        raise BadInput(f"{where}: must list, stage by stage, the tasks that assign gives out (or be left out)")
    return stages


def _lists(tree: object, names: tuple[str, ...], where: str, rule: str, empty: bool) -> Lists:
    lists = [[] if empty and entry == [] else listing(entry, where, rule) for entry in listing(tree, where, rule)]
    return tuple(tuple(_index(name, names, where) for name in entry) for entry in lists)


def _index(name: object, names: tuple[str, ...], where: str) -> int:
    expect(isinstance(name, str), where, "lists of task names", name)
    _check_name(where, str(name), names)
    return names.index(str(name))


def _defaults(tree: object, where: str) -> Mapping[str, Any]:
    """Section and key names are checked here, values when the run's config is built."""
    sections = mapping(tree, where)
    hints = {key: hint for key, hint in get_type_hints(RunConfig).items() if key not in NOT_DEFAULTS}
    for name, section in sections.items():
        _check_name(f"{where}.{name}", name, tuple(hints))
        keys = mapping(section, f"{where}.{name}")
        expect(name != "scenario" or "name" not in keys, f"{where}.scenario", "without name", keys)
        if name != "strategy" and is_dataclass(hints[name]):  # a method adds options of its own
            for key in keys:
                _check_name(f"{where}.{name}.{key}", key, tuple(entry.name for entry in fields(hints[name])))
    return sections


def _expand(text: str, where: str) -> str:
    """Puts the environment's value in the place of one `${NAME}`."""
    found = re.search(r"\$\{(\w+)\}", text)
    if found is None:
        return text
    value = os.environ.get(found[1], "")
    if not value:
        hint = f"set it to the folder with the data: export {found[1]}=/path/to/data"
        raise BadInput(f"{where}: the environment variable {found[1]} is not set; {hint}")
    return text[: found.start()] + value + text[found.end() :]


def _check_name(where: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise unknown(where, name, known)


def _join(stage: tuple[int, ...], names: tuple[str, ...]) -> str:
    return ", ".join(names[task] for task in stage)
