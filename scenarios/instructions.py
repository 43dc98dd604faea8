"""From records to rows: every record is checked when its store is loaded, and read again when its row is asked for."""

import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedstrata.core.errors import BadInput
from fedstrata.scenarios.example import Example, ImageSource
from fedstrata.scenarios.formats import FORMATS, Parsed, clean, typed
from fedstrata.scenarios.images import FolderImages, ImageFile, ZipImages, ZipMember
from fedstrata.scenarios.jsonfile import brief
from fedstrata.scenarios.marking import Marker, name_of
from fedstrata.scenarios.rows import Marks, Rows


class Store(Protocol):
    """Where records lie: `label` is what messages begin with, `short` what stands in lists."""

    @property
    def label(self) -> str: ...

    @property
    def short(self) -> str: ...

    def scan(self) -> Iterator[Any]:
        """All records in order, one in memory at a time."""

    def fetch(self, number: int) -> Any:
        """The record with this number, counted from 1. Raises `BadInput` when it was changed since it was scanned."""


@dataclass(frozen=True)
class Reading:
    """How records become rows.

    Attributes:
        whole: a conversation is one example (training); else every answered turn is one (scoring).
        where: only records whose fields have these values; `answers`: only rows with one of these answers.
        source: the record's field, or a function of the record, whose value goes into `Marks.source`.
    """

    format: str = "auto"
    images: FolderImages | ZipImages | None = None
    suffix: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    whole: bool = True
    where: Mapping[str, str] = field(default_factory=dict)
    answers: frozenset[str] = frozenset()
    source: str | Callable[[Mapping[str, Any]], str] | None = None

    def parse(self, record: Any, where: str) -> Parsed:
        """Raises `BadInput` that begins with `where` (file and record)."""
        return FORMATS[self.format](typed(record, dict, where, "a mapping"), where, self.fields)

    def wants(self, record: Mapping[str, Any]) -> bool:
        return all(key in record and _word(record[key]) == value for key, value in self.where.items())

    def origin(self, record: Mapping[str, Any], where: str) -> str | None:
        """The row's source. Raises `BadInput` for a record without the field."""
        if self.source is None:
            return None
        if callable(self.source):
            return clean(self.source(record), f"{where}: source")
        if record.get(self.source) is None:
            came = brief(", ".join(record))
            raise BadInput(f"{where}: must have the field {self.source} that the partition names, got the keys {came}")
        return clean(_word(record[self.source]), f"{where}: {self.source}")

    def picture(self, parsed: Parsed, where: str) -> ImageSource | None:
        """Raises `BadInput` for a name that leaves its root."""
        if not isinstance(parsed.image, str):
            return parsed.image
        if self.images is None:
            came = f"got image {brief(parsed.image)}"
            raise BadInput(f"{where}: the task must name its images (a folder or a .zip file), {came}")
        return self.images.source(parsed.image, where)

    def lacks(self, image: ImageSource | None) -> bool:
        """Whether it is a picture by name that is not there."""
        return isinstance(image, ImageFile | ZipMember) and self.images is not None and not self.images.has(image)

    def examples(self, parsed: Parsed, base: str, image: ImageSource | None) -> list[Example]:
        """One example, or one for each answered turn, `base#1`, `base#2`, ..."""
        end = f"\n{self.suffix}" if self.suffix else ""
        turns = [(question + end, answer) for question, answer in parsed.turns]
        if self.whole:
            return [Example(base, *turns[0], image, tuple(turns[1:]))]
        return [Example(name_of(base, k, len(turns)), *turn, image) for k, turn in enumerate(turns)]


@dataclass
class Found:
    """What loading found: things worth telling, and pictures that are not there."""

    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def refuse_missing(found: Found, where: str) -> None:
    """Raises `BadInput` when pictures are missing: how many, and the first few."""
    if found.missing:
        some = ", ".join(found.missing[:3]) + (", ..." if len(found.missing) > 3 else "")
        raise BadInput(f"{where}: {len(found.missing)} images are missing: {some}")


def load(store: Store, reading: Reading, found: Found) -> Rows:
    """Checks every record.

    Raises:
        BadInput: one message with the store, the record (counted from 1), the rule and what came. Missing pictures are
            told to `found` instead.
    """
    marker, turns, ignored = Marker(), array("H"), 0
    for number, record in enumerate(store.scan(), 1):
        where = f"{store.label}: record {number}"
        parsed = reading.parse(record, where)
        if not reading.wants(record):
            continue
        image = reading.picture(parsed, where)
        if reading.lacks(image):
            found.missing.append(f"{brief(parsed.image)} ({store.short}: record {number})")
        ignored += parsed.ignored
        origin, own = reading.origin(record, where), usable_id(parsed.id, where)
        examples = reading.examples(parsed, "", image)
        for turn, example in enumerate(examples):
            if not reading.answers or example.answer in reading.answers:
                marker.add(example, own, number, turn, len(examples), origin)
                turns.append(_small(turn, where))
    _check_any(store.label, len(turns), reading)
    if ignored:
        found.notes.append(f"{store.label}: {ignored} turns ignored: no question with an answer right after it")
    return StoredRows(store, reading, marker, turns)


def usable_id(given: object, where: str) -> str | None:
    """The record's own id as text; None for what cannot be one."""
    if isinstance(given, bool) or not isinstance(given, str | int) or str(given) == "":
        return None
    return clean(str(given), f"{where}: id")


class StoredRows(Rows):
    """Rows of one store: record numbers, turns and marks."""

    def __init__(self, store: Store, reading: Reading, marker: Marker, turns: "array[int]") -> None:
        self._store, self._reading, self._marker, self._turns = store, reading, marker, turns
        self.marks: Marks = marker.marks()

    def __len__(self) -> int:
        return len(self._turns)

    def read(self, row: int) -> Example:
        number = self._marker.number(row)
        where = f"{self._store.label}: record {number}"
        parsed = self._reading.parse(self._store.fetch(number), where)
        base = self._marker.id_of(row, usable_id(parsed.id, where))
        return self._reading.examples(parsed, base, self._reading.picture(parsed, where))[self._turns[row]]


def _check_any(where: str, rows: int, reading: Reading) -> None:
    """Raises `BadInput` when no row is left."""
    if not rows and (reading.where or reading.answers):
        told = [f"where {dict(reading.where)}"] if reading.where else []
        told += [f"answers {sorted(reading.answers)}"] if reading.answers else []
        raise BadInput(f"{where}: no row is left by {' and '.join(told)}")
    if not rows:
        raise BadInput(f"{where}: must hold at least one record, got none")


def _word(value: object) -> str:
    """A field's value as people write it: texts as they are, all else as in JSON (`true`, `3`)."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _small(turn: int, where: str) -> int:
    if turn >= 2**16:
        raise BadInput(f"{where}: conversations must have at most {2**16:,} answered turns")
    return turn
