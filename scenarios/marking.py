"""Marks and ids of rows while their file is read: a few numbers a row, whatever its texts are."""

import re
from array import array

import numpy as np
from numpy.typing import NDArray

from fedstrata.scenarios.example import Example, image_word
from fedstrata.scenarios.rows import Hashes, Marks, hash_texts, texts_of

ODD = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / the golden ratio: spreads a hash over all bits
NONE = np.uint64(0)
_LIKE_A_TURN = re.compile(r"#\d+$")  # an id of a record's own that `name_of` may give to a turn of another


def name_of(base: str, turn: int, turns: int) -> str:
    """The id of one turn of a record."""
    return base if turns == 1 or not base else f"{base}#{turn + 1}"


class Marker:
    """Collects marks; ids become unique: a record keeps its own id, one without or with a repeated one gets its number,
    and dashes until nobody else has it."""

    def __init__(self) -> None:
        self._content, self._asked, self._answer, self._source = bytearray(), bytearray(), bytearray(), bytearray()
        self._ids, self._numbers, self._turns = bytearray(), array("l"), array("l")
        self._like_turns, self._split = bytearray(), False
        self._names: dict[int, str] = {}  # record number → its id, where that is neither its own nor its number
        self._renamed: NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)

    def add(self, example: Example, base: str | None, number: int, turn: int, turns: int, origin: str | None) -> None:
        """One row: an example without id, its record's own id and number, which of its `turns` it is, its source."""
        word = image_word(example)
        self._content += hash_texts(*texts_of(example, word), size=16)
        self._asked += hash_texts(word, example.question)
        self._answer += hash_texts(example.answer)
        self._source += b"" if origin is None else hash_texts(origin)
        self._ids += bytes(8) if base is None else hash_texts(base)
        self._numbers.append(number)
        self._turns.append(turn)
        self._like_turns.append(turns == 1 and base is not None and bool(_LIKE_A_TURN.search(base)))
        self._split |= turns > 1

    def number(self, row: int) -> int:
        """The row's record, counted from 1."""
        return self._numbers[row]

    def id_of(self, row: int, own: str | None) -> str:
        """The id of the row's record."""
        if own is not None and not self._renamed[row]:
            return own
        number = self._numbers[row]
        return self._names.get(number, str(number))

    def marks(self) -> Marks:
        """Settles the ids, then the marks."""
        numbers, turns = np.array(self._numbers, dtype=np.int64), np.array(self._turns, dtype=np.uint64)
        ids = _hashes(self._ids).copy()
        self._renamed = self._settle(ids, numbers)
        content = _hashes(self._content).reshape(-1, 2).copy()
        with np.errstate(over="ignore"):
            mixed = ids + turns * ODD
            content[:, 0] ^= mixed
            content[:, 1] ^= mixed * ODD
        source = _hashes(self._source) if self._source else None
        marks = Marks(content, _hashes(self._asked), _hashes(self._answer), source)
        self._content, self._asked, self._answer = bytearray(), bytearray(), bytearray()
        self._source, self._ids, self._turns, self._like_turns = bytearray(), bytearray(), array("l"), bytearray()
        return marks

    def _settle(self, ids: Hashes, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Gives every record an id of its own: changes `ids`; True for rows whose record lost its own id."""
        _, firsts, owners = np.unique(ids, return_index=True, return_inverse=True)
        renamed: NDArray[np.bool_] = (ids == NONE) | (numbers[firsts[owners]] != numbers)
        if self._split:  # some ids will end with #1, #2, ...
            renamed |= np.frombuffer(self._like_turns, dtype=np.bool_)
        taken = set(ids[~renamed].tolist()) if renamed.any() and not renamed.all() else set()
        for row in np.flatnonzero(renamed).tolist():
            ids[row] = self._rename(int(numbers[row]), taken)
        return renamed

    def _rename(self, number: int, taken: set[int]) -> int:
        """The hash of the record's new id: its number, dashed until it is free."""
        name = self._names.get(number, str(number))
        while (found := int.from_bytes(hash_texts(name), "little")) in taken:
            name += "-"
        if name != str(number):
            self._names[number] = name
        return found


def _hashes(data: bytearray) -> Hashes:
    return np.frombuffer(bytes(data), dtype="<u8")
