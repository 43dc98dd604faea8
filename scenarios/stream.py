"""What a scenario is made of: examples, tasks, stages. All of it frozen, all of it a pure function of (file, seed)."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image


class ImageSource(Protocol):
    """Where an example's picture comes from; opened only when it is needed."""

    def open(self) -> Image.Image:
        """The picture, RGB. Raises `BadInput` naming the file when it cannot be read."""

    def key(self) -> str:
        """A string that is equal for equal pictures, for caches and duplicate checks."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """A generated picture: `array` is uint8 [height, width, 3]."""

    array: np.ndarray

    def open(self) -> Image.Image:
        return Image.fromarray(self.array, "RGB")

    def key(self) -> str:
        return hashlib.sha256(self.array.tobytes()).hexdigest()


@dataclass(frozen=True)
class Example:
    """One instruction: `question` carries no image tag; `image` is None for a text-only task."""

    id: str
    question: str
    answer: str
    image: ImageSource | None = None


@dataclass(frozen=True)
class Task:
    """A named set of instructions with its metric (a name in `fedstrata.core.scoring.SCORERS`).

    `suffix` is kept for the record: every question already ends with it.
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    val: Sequence[Example] = ()
    metric: str = "exact_match"
    suffix: str = ""


def image_word(example: Example) -> str:
    """What names the example's picture on every machine: its name in the data files, or a generated one's hash."""
    if example.image is None:
        return ""
    # key() of a file holds the folder it lies in, which differs from machine to machine; its name does not
    return str(getattr(example.image, "name", "")) or example.image.key()


def digest(examples: Iterable[Example]) -> str:
    """SHA-256 over ids, questions, answers and picture words, in order; the same on every machine."""
    sha = hashlib.sha256()
    for example in examples:
        for text in (example.id, example.question, example.answer, image_word(example)):
            part = text.encode()
            sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class Scenario:
    """Which data exists when, and for whom. Tasks and clients are counted from 0.

    Attributes:
        stages: the tasks that arrive at each stage.
        assign: heterogeneous: per stage, the task of the client at each position of a round's participants
            (position modulo length); None: homogeneous, every participant trains all tasks of the stage.
        shares: `[task][client]` → ascending indices into the task's `train`.
        vocabularies: per task, the set of its answers.
        beta: the partition's Dirichlet concentration; None where the partition has none.
        hash: SHA-256 of everything that decides the scenario: stages, partition, clients, seed and the examples.
    """

    name: str
    tasks: tuple[Task, ...]
    stages: tuple[tuple[int, ...], ...]
    assign: tuple[tuple[int, ...], ...] | None
    shares: tuple[tuple[tuple[int, ...], ...], ...]
    vocabularies: tuple[frozenset[str], ...]
    beta: float | None
    seed: int
    hash: str

    @property
    def client_count(self) -> int:
        return len(self.shares[0])

    @property
    def stage_names(self) -> tuple[str, ...]:
        """For people: `1 names`, `2 charts+icons`, `3 charts+4 more`."""
        return tuple(f"{number} {self._label(stage)}" for number, stage in enumerate(self.stages, 1))

    def _label(self, stage: tuple[int, ...]) -> str:
        if len(stage) > 2:
            return f"{self.tasks[stage[0]].name}+{len(stage) - 1} more"
        return "+".join(self.tasks[task].name for task in stage)

    def tasks_of(self, stage: int, position: int) -> tuple[int, ...]:
        """The tasks that the participant at `position` trains in `stage`."""
        if self.assign is None:
            return self.stages[stage]
        positions = self.assign[stage]
        return (positions[position % len(positions)],)

    def share(self, task_indices: Iterable[int], client: int) -> list[Example]:
        """The client's training examples of those tasks: by task, then in the task's own order."""
        chosen = sorted(set(task_indices))
        return [self.tasks[task].train[row] for task in chosen for row in self.shares[task][client]]

    def share_size(self, task_indices: Iterable[int], client: int) -> int:
        """`len(share(...))` without collecting it."""
        return sum(len(self.shares[task][client]) for task in set(task_indices))

    def seen(self, stages_done: int) -> tuple[bool, ...]:
        """Per task, whether the first `stages_done` stages trained it."""
        trained = {task for stage in self.stages[:stages_done] for task in stage}
        return tuple(task in trained for task in range(len(self.tasks)))

    def data_key(self, task_indices: Iterable[int], client: int) -> str:
        """16 hex digits that change exactly when this client's data of these tasks does."""
        return digest(self.share(task_indices, client))[:16]

    def vocabulary(self, task_index: int) -> frozenset[str]:
        """The task's answers: all that its generator can give, or all that its data files hold."""
        return self.vocabularies[task_index]
