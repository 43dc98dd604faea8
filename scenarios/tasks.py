"""From a task's block in the scenario file to its examples."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedstrata.core.errors import unknown
from fedstrata.scenarios.definition import FileTask, GeneratedTask
from fedstrata.scenarios.instructions import load_examples, spread
from fedstrata.scenarios.mini import ANSWERS, MINI_TASKS, mini_task
from fedstrata.scenarios.stream import Example, Task, image_word

MOST_HELD_OUT = 100
Draw = Callable[[str, int, int, int, int], Task]
GENERATORS: Mapping[str, tuple[Sequence[str], Draw, Mapping[str, frozenset[str]]]] = {
    "fcit-mini": (MINI_TASKS, mini_task, ANSWERS)
}
"""Generator → (its tasks, the function that draws one, each task's answers)."""


def load(name: str, spec: GeneratedTask | FileTask, folder: Path, seed: int, where: str) -> tuple[Task, frozenset[str]]:
    """The task and the set of its answers. Raises `BadInput`."""
    if isinstance(spec, GeneratedTask):
        return _generated(name, spec, seed, where)
    task = _from_files(name, spec, folder)
    return task, frozenset(example.answer for split in (task.train, task.val, task.test) for example in split)


def _generated(name: str, spec: GeneratedTask, seed: int, where: str) -> tuple[Task, frozenset[str]]:
    known = [f"{generator}/{task}" for generator, (tasks, _, _) in GENERATORS.items() for task in tasks]
    if spec.generate not in known:
        raise unknown(f"{where}.generate", spec.generate, known)
    generator, _, kind = spec.generate.partition("/")
    _, draw, answers = GENERATORS[generator]
    drawn = draw(kind, seed, spec.train, spec.val, spec.test)
    return Task(name, drawn.train, drawn.test, drawn.val, spec.metric, drawn.suffix), answers[kind]


def _from_files(name: str, spec: FileTask, folder: Path) -> Task:
    images = None if spec.images is None else folder / spec.images
    rows = load_examples(folder / spec.train, images, suffix=spec.suffix)
    test = load_examples(folder / spec.test, images, spec.test_rows, spec.suffix)
    if spec.val is None:
        train, val = hold_out(rows, spec.train_rows)
    else:
        train = [rows[index] for index in spread(len(rows), spec.train_rows)]
        val = load_examples(folder / spec.val, images, suffix=spec.suffix)
    return Task(name, tuple(train), tuple(test), tuple(val), spec.metric, spec.suffix)


def hold_out(rows: Sequence[Example], train_rows: int | None) -> tuple[list[Example], list[Example]]:
    """(train, val), with no (picture, question) in both.

    `val` has a tenth of the rows, 100 at most: rows that `train_rows` leaves unused, or else rows taken out of train.
    A single row stays in train.
    """
    chosen = set(spread(len(rows), train_rows))
    train = [row for index, row in enumerate(rows) if index in chosen]
    count = min(MOST_HELD_OUT, max(1, len(rows) // 10))
    unused = _without([row for index, row in enumerate(rows) if index not in chosen], train)
    if unused:
        return train, [unused[index] for index in spread(len(unused), count)]
    val = [train[index] for index in spread(len(train), count)]
    rest = _without(train, val)
    return (rest, val) if rest else (train, [])


def _without(rows: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    taken = {(image_word(row), row.question) for row in others}
    return [row for row in rows if (image_word(row), row.question) not in taken]
