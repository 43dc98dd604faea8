"""Instruction files in LLaVA's conversation layout (github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md).

`[{"id": ..., "image": "a/1.png", "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}, ...]`;
extra keys are ignored, a record without `image` is text-only.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedstrata.core.errors import BadInput
from fedstrata.core.seeds import generator
from fedstrata.scenarios.images import FolderImages, ZipImages, open_images
from fedstrata.scenarios.jsonfile import brief, read_records
from fedstrata.scenarios.stream import Example, ImageSource

log = logging.getLogger(__name__)

IMAGE_TAG = "<image>"
ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant")


def load_examples(
    path: str | Path, images: str | Path | None = None, limit: int | None = None, suffix: str = ""
) -> list[Example]:
    """Every question with its answer: one example a record; `id#1`, `id#2`, ... of a record with several.

    Args:
        images: the folder or .zip file that the records' `image` names are relative to.
        limit: take this many examples, spread over the file (`spread`). The whole file is checked all the same.
        suffix: put on a line of its own at the end of every question.

    Raises:
        BadInput: one message with the file, the record (counted from 1), the rule and what came. Missing pictures
            are counted, the first few named.
    """
    reader = _Reader(Path(path), None if images is None else open_images(images), suffix)
    records = enumerate(read_records(reader.path), 1)
    examples = [example for number, record in records for example in reader.read(number, record)]
    reader.finish(len(examples))
    return [examples[index] for index in spread(len(examples), limit)]


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


class _Reader:
    """Turns records into examples; remembers the ids given and the pictures missed."""

    def __init__(self, path: Path, images: FolderImages | ZipImages | None, suffix: str) -> None:
        self.path, self.images, self.suffix = path, images, suffix
        self.ids: set[str] = set()
        self.missing: list[str] = []
        self.ignored = 0

    def read(self, number: int, record: Any) -> Iterator[Example]:
        where = f"{self.path}: record {number}"
        record = _typed(record, dict, where, "a mapping")
        pairs = self._pairs(record, where)
        image = self._image(record, where)
        ends = [""] if len(pairs) == 1 else [f"#{turn}" for turn in range(1, len(pairs) + 1)]
        base = self._free_id(record.get("id"), number, ends)
        for end, (question, answer) in zip(ends, pairs, strict=True):
            yield Example(base + end, question, answer, image)

    def finish(self, count: int) -> None:
        """Raises `BadInput` for what only the whole file shows."""
        if not count:
            raise BadInput(f"{self.path}: must hold at least one record, got none")
        if self.missing and self.images is not None:
            some = ", ".join(self.missing[:3]) + (", ..." if len(self.missing) > 3 else "")
            raise BadInput(f"{self.path}: {len(self.missing)} images are missing under {self.images.root}: {some}")
        if self.ignored:
            log.warning("%s: %d turns ignored: no question with an answer right after it", self.path, self.ignored)

    def _pairs(self, record: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
        """[(question, answer)] of the questions that are answered in the next turn."""
        turns = _typed(record.get("conversations"), list, f"{where}: conversations", "a list of turns")
        said = [_turn(turn, f"{where}: turn {place}") for place, turn in enumerate(turns, 1)]
        pairs = [
            (self._question(ask[1], where), _filled(reply[1], f"{where}: answer"))
            for ask, reply in pairwise(said)
            if ask[0] in ASKS and reply[0] in ANSWERS
        ]
        if not pairs:
            came = brief(", ".join(who for who, _ in said))
            raise BadInput(f"{where}: conversations must hold a human turn followed by a gpt turn, got {came}")
        self.ignored += len(said) - 2 * len(pairs)
        return pairs

    def _question(self, text: str, where: str) -> str:
        question = _filled(text.replace(IMAGE_TAG, ""), f"{where}: question (without {IMAGE_TAG})")
        return f"{question}\n{self.suffix}" if self.suffix else question

    def _image(self, record: Mapping[str, Any], where: str) -> ImageSource | None:
        name = record.get("image")
        if name is None:
            return None
        name = _typed(name, str, f"{where}: image", "a path")
        if self.images is None:
            raise BadInput(f"{where}: the task must name its images (a folder or a .zip file), got image {brief(name)}")
        return self._found(self.images, name, where)

    def _found(self, images: FolderImages | ZipImages, name: str, where: str) -> ImageSource:
        source = images.source(name, where)
        if not images.has(source):
            self.missing.append(f"{brief(name)} ({where.rpartition(': ')[2]})")
        return source

    def _free_id(self, given: object, number: int, ends: Sequence[str]) -> str:
        """The record's own id; its number where it has none or another record has it, dashed until it is free."""
        usable = isinstance(given, str | int) and not isinstance(given, bool) and str(given) != ""
        base = _text(str(given), f"{self.path}: record {number}: id") if usable else str(number)
        if any(base + end in self.ids for end in ends):
            base = str(number)
        while any(base + end in self.ids for end in ends):
            base += "-"
        self.ids.update(base + end for end in ends)
        return base


def _turn(turn: Any, where: str) -> tuple[str, str]:
    """(who, what they said)."""
    fields = _typed(turn, dict, where, "a mapping with from and value")
    who = _typed(fields.get("from"), str, f"{where}: from", "human or gpt")
    return who, _text(_typed(fields.get("value"), str, f"{where}: value", "a text"), f"{where}: value")


def _typed(value: Any, kind: type, where: str, rule: str) -> Any:
    if not isinstance(value, kind):
        raise BadInput(f"{where} must be {rule}, got {brief(value)}")
    return value


def _filled(text: str, where: str) -> str:
    if not text.strip():
        raise BadInput(f"{where} must not be empty, got {brief(text)}")
    return text.strip()


def _text(text: str, where: str) -> str:
    """Refuses what no tokenizer takes: NUL characters and halves of surrogate pairs."""
    if "\0" in text or (not text.isascii() and any("\ud800" <= mark <= "\udfff" for mark in text)):
        raise BadInput(f"{where} must be Unicode text without NUL characters, got {brief(text)}")
    return text
