"""From a task's block in the scenario file to its rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedstrata.core.errors import BadInput, unknown
from fedstrata.core.seeds import generator
from fedstrata.scenarios.definition import FileTask, GeneratedTask
from fedstrata.scenarios.files import Found, Reading, load_file, refuse_missing
from fedstrata.scenarios.hub import load_hub
from fedstrata.scenarios.images import open_images
from fedstrata.scenarios.jsonfile import is_folder
from fedstrata.scenarios.mini import ANSWERS, MINI_TASKS, mini_task
from fedstrata.scenarios.mini_domain import DOMAIN_ANSWERS, DOMAIN_TASKS, domain_task
from fedstrata.scenarios.pretraining import PRETRAINING_TASKS, pretraining_task
from fedstrata.scenarios.rows import Hashes, Rows, rows_of
from fedstrata.scenarios.stream import Example, Task

MOST_HELD_OUT = 100
MOST_ANSWERS = 10_000  # a task with more different ones is open-ended: it has no vocabulary
Vocabulary = frozenset[str] | None
Draw = Callable[[str, int, int, int, int], Task]
GENERATORS: Mapping[str, tuple[Sequence[str], Draw, Mapping[str, Vocabulary]]] = {
    "fcit-mini": (MINI_TASKS, mini_task, ANSWERS),
    "fcit-mini-domain": (DOMAIN_TASKS, domain_task, DOMAIN_ANSWERS),
    "pretraining": (PRETRAINING_TASKS, pretraining_task, dict.fromkeys(PRETRAINING_TASKS)),
}
"""Generator → (its tasks, the function that draws one, each task's answers, None where they are open-ended)."""


def load(
    name: str,
    spec: GeneratedTask | FileTask,
    folder: Path,
    seed: int,
    where: str,
    source: str | None = None,
    strict: bool = True,
) -> tuple[Task, Vocabulary]:
    """The task and the set of its answers, None where it is open-ended.

    Args:
        source: the records' field that the partition goes by.
        strict: refuse missing pictures; else they are listed in the task.

    Raises:
        BadInput: a mistake in the task's block, its files or one of their records.
    """
    if isinstance(spec, GeneratedTask):
        if source:
            raise BadInput(f"{where}: generated examples have no field {source} that the partition could go by")
        return _generated(name, spec, seed, where)
    task = _from_files(name, spec, folder, where, source, strict)
    return task, vocabulary((task.train, task.val, task.test))


def vocabulary(splits: Iterable[Sequence[Example]]) -> Vocabulary:
    """The different answers, of which only one row each is read; None when there are too many."""
    found: dict[int, tuple[Rows, int]] = {}
    for rows in map(rows_of, splits):
        codes, firsts = np.unique(rows.marks.answer, return_index=True)
        if len(codes) > MOST_ANSWERS:
            return None
        found |= {int(code): (rows, int(first)) for code, first in zip(codes, firsts, strict=True)}
    return frozenset(rows[row].answer for rows, row in found.values()) if len(found) <= MOST_ANSWERS else None


def _generated(name: str, spec: GeneratedTask, seed: int, where: str) -> tuple[Task, Vocabulary]:
    known = [f"{generator}/{task}" for generator, (tasks, _, _) in GENERATORS.items() for task in tasks]
    if spec.generate not in known:
        raise unknown(f"{where}.generate", spec.generate, known)
    family, _, kind = spec.generate.partition("/")
    _, draw, answers = GENERATORS[family]
    drawn = draw(kind, seed, spec.train, spec.val, spec.test)
    return Task(name, drawn.train, drawn.test, drawn.val, spec.metric, drawn.suffix), answers[kind]


def _from_files(name: str, spec: FileTask, folder: Path, where: str, source: str | None, strict: bool) -> Task:
    found = Found()
    rows = _split(spec, spec.train, folder, _reading(spec, folder, source), found)
    scored = replace(_reading(spec, folder, None), whole=False)
    test = _split(spec, spec.test, folder, scored, found)
    test = test.take(spread(len(test), spec.test_rows))
    if spec.val == "":
        train, val = rows.take(spread(len(rows), spec.train_rows)), rows.take([])
    elif spec.val is None:
        chosen, held = hold_out(rows.marks.asked, spec.train_rows)
        train, val = rows.take(chosen), rows.take(held)
    else:
        train = rows.take(spread(len(rows), spec.train_rows))
        val = _split(spec, spec.val, folder, scored, found)
    if strict:
        refuse_missing(found, where)
    notes, beside = (tuple(found.notes), tuple(found.missing)), tuple(spec.beside)
    return Task(name, train, test, val, spec.metric, spec.suffix, beside, *notes)


def _reading(spec: FileTask, folder: Path, source: str | None) -> Reading:
    return Reading(
        format=spec.format,
        images=None if spec.images is None else open_images(folder / spec.images),
        suffix=spec.suffix,
        fields=spec.fields,
        where=spec.where,
        answers=frozenset(spec.answers),
        source=source,
    )


def _split(spec: FileTask, name: str, folder: Path, reading: Reading, found: Found) -> Rows:
    """A file, or with `dataset` one of its splits."""
    if spec.dataset is None:
        return load_file(folder / name, reading, found)
    local = folder / spec.dataset
    return load_hub(str(local) if is_folder(local) else spec.dataset, spec.subset, name, reading, found)


def spread(n: int, limit: int | None) -> list[int]:
    """Ascending indices below `n`: all, or one from each of `limit` equal slices of the range.

    The place within a slice is drawn (always alike), so that files sorted by class and files in which the classes
    take turns both stay balanced.
    """
    if limit is None or limit >= n:
        return list(range(n))
    edges = [slot * n // limit for slot in range(limit + 1)]
    places = generator(0, "spread", n, limit).random(limit)
    return [low + int(place * (high - low)) for (low, high), place in zip(pairwise(edges), places, strict=True)]


def hold_out(asked: Hashes, train_rows: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train, val): ascending rows, with no (picture, question) in both; `asked` marks which rows are equal in it.

    `val` has a tenth of the rows, 100 at most: rows that `train_rows` leaves unused, or else rows taken out of train.
    A single row stays in train.
    """
    n = len(asked)
    train = np.arange(n) if train_rows is None else np.array(spread(n, train_rows), dtype=np.int64)
    count = min(MOST_HELD_OUT, max(1, n // 10))
    unused = _without(asked, np.setdiff1d(np.arange(n), train, assume_unique=True), train)
    if len(unused):
        return train, unused[spread(len(unused), count)]
    val = train[spread(len(train), count)]
    rest = _without(asked, train, val)
    return (rest, val) if len(rest) else (train, train[:0])


def _without(asked: Hashes, rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    kept: NDArray[np.int64] = rows[~np.isin(asked[rows], asked[others])]
    return kept
