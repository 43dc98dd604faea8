"""Rows of a split: examples that are read when they are asked for, and what is known of each without reading it.

A million rows cost a few dozen bytes each here, whatever they hold; hashes stand for texts.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fedstrata.scenarios.example import Example, image_word

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Marks:
    """Per row 64-bit hashes [n], the same on every machine; equal hashes mean equal texts.

    Attributes:
        content: two hashes [n, 2] over all of the example.
        asked: over (picture's word, question): what may not lie in train and test at once.
        answer: over the answer.
        source: over the record's source field; None where the task names none.
    """

    content: Hashes
    asked: Hashes
    answer: Hashes
    source: Hashes | None = None

    def take(self, rows: NDArray[np.int64]) -> "Marks":
        source = None if self.source is None else self.source[rows]
        return Marks(self.content[rows], self.asked[rows], self.answer[rows], source)

    @property
    def digest(self) -> str:
        """SHA-256 over all rows in order."""
        return hashlib.sha256(self.content.astype("<u8").tobytes()).hexdigest()


class Rows(Sequence[Example]):
    """A split's rows. Subclasses give `marks`, `__len__` and `read`."""

    marks: Marks

    @abstractmethod
    def read(self, row: int) -> Example:
        """One row, read anew each time. Raises `BadInput` when its file is gone or was changed since it was loaded."""

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> "Rows": ...
    def __getitem__(self, row: int | slice) -> "Example | Rows":
        if isinstance(row, slice):
            return self.take(range(*row.indices(len(self))))
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self.read(row % len(self))

    def __iter__(self) -> Iterator[Example]:
        return (self.read(row) for row in range(len(self)))

    def take(self, rows: "Iterable[int] | NDArray[np.int64]") -> "Rows":
        """The rows with these indices, in this order; reads none."""
        return _Taken(self, np.fromiter(rows, dtype=np.int64))


class Listed(Rows):
    """Rows held in memory: generated ones, and those of tests."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self._examples = tuple(examples)

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, row: int) -> Example:
        return self._examples[row]

    @cached_property
    def marks(self) -> Marks:  # type: ignore[override]  # computed when first asked for
        return marks_of(self._examples)


class Joined(Rows):
    """Several rows, one after another."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self._parts])
        marks = [part.marks for part in self._parts]
        sources = [mark.source for mark in marks if mark.source is not None]
        self.marks = Marks(
            np.concatenate([mark.content for mark in marks]),
            np.concatenate([mark.asked for mark in marks]),
            np.concatenate([mark.answer for mark in marks]),
            np.concatenate(sources) if len(sources) == len(marks) else None,
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, row: int) -> Example:
        part = int(np.searchsorted(self._ends, row, side="right"))
        return self._parts[part].read(row - (int(self._ends[part - 1]) if part else 0))


class _Taken(Rows):
    """Some rows of others."""

    def __init__(self, rows: Rows, indices: NDArray[np.int64]) -> None:
        self._rows, self._indices = rows, indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, row: int) -> Example:
        return self._rows[int(self._indices[row])]

    @cached_property
    def marks(self) -> Marks:  # type: ignore[override]
        return self._rows.marks.take(self._indices)


def rows_of(examples: Sequence[Example]) -> Rows:
    """`examples` as rows."""
    return examples if isinstance(examples, Rows) else Listed(examples)


def marks_of(examples: Iterable[Example]) -> Marks:
    """Marks of examples that are in memory."""
    content, asked, answer = bytearray(), bytearray(), bytearray()
    for example in examples:
        word = image_word(example)
        content += hash_texts(example.id, *texts_of(example, word), size=16)
        asked += hash_texts(word, example.question)
        answer += hash_texts(example.answer)
    return Marks(_hashes(content).reshape(-1, 2), _hashes(asked), _hashes(answer))


def hash_texts(*texts: str, size: int = 8) -> bytes:
    """BLAKE2b over the texts with their lengths: `size` bytes."""
    sha = hashlib.blake2b(digest_size=size)
    for text in texts:
        part = text.encode()
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.digest()


def texts_of(example: Example, word: str) -> Iterator[str]:
    """All of an example but its id; `word` names its picture."""
    yield from (example.question, example.answer, word, str(len(example.more)))
    for turn in example.more:
        yield from turn
    yield from example.references


def _hashes(data: Any) -> Hashes:
    return np.frombuffer(bytes(data), dtype="<u8")
