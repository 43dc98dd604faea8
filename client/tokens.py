"""Tokens of examples that were seen before: a client trains the same rows in many rounds."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from fedstrata.client.model import BaseModel
from fedstrata.client.prompts import Prepared
from fedstrata.core.config import TrainSection
from fedstrata.scenarios.stream import Example

LIMIT = 2**20  # tokens kept for one base, about 40 MB

_kept: "WeakKeyDictionary[BaseModel, _Kept]" = WeakKeyDictionary()


def tokens(base: BaseModel, examples: Sequence[Example], settings: TrainSection) -> list[Prepared]:
    """`base.tokenise`, but for what this process still holds of it.

    Raises:
        BadInput: an example that is too long, or one whose text holds the image tag's token.
    """
    kept = _kept.setdefault(base, _Kept())
    keys = [_key(example, settings) for example in examples]
    new = {key: example for key, example in zip(keys, examples, strict=True) if key not in kept.rows}
    fresh = base.tokenise(list(new.values()), settings.max_length, settings.overlong) if new else []
    found = {key: kept.rows[key] for key in keys if key in kept.rows} | dict(zip(new, fresh, strict=True))
    kept.add(found)
    return [_of(found[key], example) for key, example in zip(keys, examples, strict=True)]


class _Kept:
    """The rows that were asked for last."""

    def __init__(self) -> None:
        self.rows: OrderedDict[Hashable, Prepared] = OrderedDict()
        self.size = 0

    def add(self, rows: dict[Hashable, Prepared]) -> None:
        """Keeps these as the newest and forgets the oldest behind the limit."""
        for key, row in rows.items():
            if key in self.rows:
                self.rows.move_to_end(key)
            else:
                self.rows[key] = row if row.image is None else replace(row, image=None)
                self.size += len(row.prompt) + len(row.answer)
        while self.size > LIMIT:
            _, row = self.rows.popitem(last=False)
            self.size -= len(row.prompt) + len(row.answer)


def _key(example: Example, settings: TrainSection) -> Hashable:
    """Everything that a row's tokens depend on, for one base: of a picture, that there is one."""
    text = (example.question, example.answer, example.more)
    return (*text, example.image is None, settings.max_length, settings.overlong)


def _of(row: Prepared, example: Example) -> Prepared:
    return row if row.image is example.image else replace(row, image=example.image)
