"""From a scenario file to a `Scenario`: load the tasks, deal their rows to clients, lay out the timeline, hash it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedstrata.core.errors import BadInput
from fedstrata.core.seeds import derive
from fedstrata.scenarios import arrival, fcit, held, tasks
from fedstrata.scenarios.definition import Definition, HeldTask
from fedstrata.scenarios.fcit_tables import FcitRule
from fedstrata.scenarios.partition import PARTITIONS, Deck, PartitionRule, Shares, describe
from fedstrata.scenarios.rows import Rows, rows_of
from fedstrata.scenarios.stream import Assign, Scenario, Task, digest

VERSION = 2  # of the hash: raised when equal definitions begin to mean other data
PUBLISHED_BETA = 1.0  # of FCIT's three, the one that the paper's tables are for


@dataclass(frozen=True)
class Dealt:
    """Tasks whose rows have their clients, and the stages they come in; `rule` is what the hash says of the deal."""

    tasks: tuple[Task, ...]
    vocabularies: tuple[frozenset[str] | None, ...]
    stages: tuple[tuple[int, ...], ...]
    assign: Assign | None
    shares: tuple[Shares, ...]
    rule: dict[str, Any]
    beta: float | None
    units: int


def assemble(
    name: str,
    definition: Definition,
    root: str,
    rule: PartitionRule,
    beta: float | None,
    clients: int,
    seed: int,
    rounds: int,
    strict: bool,
) -> Scenario:
    """The scenario of a checked file. Raises `BadInput`, see `build`."""
    if definition.held:
        return held.plan(name, definition, clients, seed, rounds)
    folder = definition.folder(root)
    if definition.fcit:
        dealt = _published(definition.fcit, folder, beta or PUBLISHED_BETA, clients, strict)
    else:
        dealt = _own(definition, rule, folder, clients, seed, strict)
    here, names = definition.path.parent, [task.name for task in dealt.tasks]
    try:
        when = arrival.timeline(definition.arrival, dealt.stages, dealt.shares, rounds, seed, names, here)
    except BadInput as error:
        raise BadInput(f"{definition.path}: arrival: {error}") from None
    arrives = arrival.describe(definition.arrival, here)
    return Scenario(
        name=name,
        tasks=dealt.tasks,
        stages=dealt.stages,
        assign=dealt.assign,
        shares=dealt.shares,
        timeline=when,
        vocabularies=dealt.vocabularies,
        beta=dealt.beta,
        seed=seed,
        hash=_hash(dealt, arrives, rounds, seed),
        units=dealt.units,
    )


def _published(rule: FcitRule, folder: Path, beta: float, clients: int, strict: bool) -> Dealt:
    found = fcit.load(rule, folder, beta, clients, strict)
    words = tuple(tasks.vocabulary([task.training, rows_of(task.test)]) for task in found.tasks)
    told = {"kind": "published", "setting": rule.setting, "beta": beta}
    return Dealt(found.tasks, words, found.stages, found.assign, found.shares, told, beta, found.units)


def _own(definition: Definition, rule: PartitionRule, folder: Path, clients: int, seed: int, strict: bool) -> Dealt:
    where = f"{definition.path}: tasks."
    specs = {name: spec for name, spec in definition.tasks.items() if not isinstance(spec, HeldTask)}
    loaded = [tasks.load(name, spec, folder, seed, where + name, rule.source, strict) for name, spec in specs.items()]
    dealt, here = [], definition.path.parent
    for number, (task, _) in enumerate(loaded):
        labels, key = _labels(task.training), derive(seed, "partition", task.name)
        deck = Deck(labels, clients, key, number, len(loaded), task.name, task.training.marks.digest, here)
        try:
            dealt.append(PARTITIONS[rule.kind](deck, rule))
        except BadInput as error:
            raise BadInput(f"{where}{task.name}: {error}") from None
    beta = rule.beta if rule.kind.startswith("dirichlet") else None
    found, words = tuple(task for task, _ in loaded), tuple(answers for _, answers in loaded)
    told = describe(rule, here)
    return Dealt(found, words, definition.stages, definition.assign, tuple(dealt), told, beta, len(loaded))


def _labels(rows: Rows) -> NDArray[np.uint64]:
    """What the partition sorts by: the source field's values where it asks for them, else the answers."""
    marks = rows.marks
    return marks.answer if marks.source is None else marks.source


def _hash(dealt: Dealt, arrives: dict[str, Any], rounds: int, seed: int) -> str:
    """No path is in it: moving the data or the file does not change what is learned, when, by whom."""
    sha = hashlib.sha256()
    content = {
        "version": VERSION,
        "tasks": [[task.name, task.metric, *map(digest, (task.train, task.val, task.test))] for task in dealt.tasks],
        "stages": dealt.stages,
        "assign": dealt.assign,
        "arrival": arrives if arrives == {"kind": "stages"} else {**arrives, "rounds": rounds},
        "partition": dealt.rule,
        "seed": seed,
    }
    sha.update(json.dumps(content, sort_keys=True).encode())
    for shares in dealt.shares:
        _add(sha, shares)
    return sha.hexdigest()


def _add(sha: "hashlib._Hash", shares: Sequence[NDArray[np.int64]]) -> None:
    for rows in shares:
        sha.update(len(rows).to_bytes(8, "little") + rows.astype("<i8").tobytes())
