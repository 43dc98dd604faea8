"""The form of kept replies: one file that is written in one pass and read through the system's page cache.

A line of JSON (padded to whole 64 bytes), the records without arrays as Flower serialises them, then the bytes of
every array, each at a multiple of 64. Reading maps the file: an array costs memory only while somebody looks at it.
"""

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flwr.app import ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from fedstrata.core import durable
from fedstrata.core.packing import gather, over

ALIGN = 64


@dataclass(frozen=True)
class Slot:
    """A file that this process has written, and what of its content is no array."""

    path: Path
    begin: int
    arrays: Sequence[Sequence[Any]]
    rests: Sequence[RecordDict]

    def load(self, number: int) -> RecordDict:
        """The `number`-th of what was written. Raises OSError when the file is gone."""
        content = RecordDict(dict(self.rests[number].items()))
        return _filled(content, number, self.arrays, _map(self.path)[self.begin :])


def write(path: Path, head: Mapping[str, Any], dicts: Sequence[RecordDict]) -> Slot:
    """Writes some records under a head; after a power cut the file may be gone. Raises OSError when it does not fit."""
    rests = [_rest(content) for content in dicts]
    parts = [recorddict_to_proto(rest).SerializeToString() for rest in rests]
    lengths, end = [len(part) for part in parts], sum(map(len, parts))
    table: list[tuple[int, str, list[Any]]] = []
    for number, content in enumerate(dicts):
        for record, held in content.items():
            if not isinstance(held, ArrayRecord):
                continue
            table.append((number, record, []))
            for name, array in held.items():
                parts += [b"\0" * (-end % ALIGN), array.data]
                begin = end + -end % ALIGN
                table[-1][2].append([name, array.dtype, list(array.shape), array.stype, begin, len(array.data)])
                end = begin + len(array.data)
    found = {**head, "records": lengths, "arrays": table, "sha256": _sha256(parts)}
    line = json.dumps(found, sort_keys=True).encode()
    line += b" " * (-(len(line) + 1) % ALIGN) + b"\n"
    durable.write_atomic(path, line, *parts, flush=False)
    return Slot(path, len(line), table, rests)


def head(path: Path) -> dict[str, Any]:
    """What a file says of itself. Raises OSError or ValueError when it says nothing."""
    found: dict[str, Any] = json.loads(_open(path)[0])
    return found


def sound(path: Path) -> bool:
    """Whether a file holds what was written. Raises OSError, ValueError, KeyError or TypeError when it is none."""
    line, body = _open(path)
    return bool(json.loads(line)["sha256"] == _sha256([body]))


def read(path: Path, number: int) -> RecordDict:
    """The `number`-th of what was written, which is not verified again. Raises OSError when the file is gone."""
    line, body = _open(path)
    found = json.loads(line)
    begin, length = sum(found["records"][:number]), found["records"][number]
    content = recorddict_from_proto(Proto.FromString(bytes(body[begin : begin + length])))
    return _filled(content, number, found["arrays"], body)


def _open(path: Path) -> tuple[bytes, memoryview]:
    data = _map(path)
    line = bytes(data[: cast(mmap.mmap, data.obj).find(b"\n") + 1])
    return line, data[len(line) :]


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _filled(content: RecordDict, which: int, arrays: Sequence[Sequence[Any]], body: memoryview) -> RecordDict:
    """Puts the arrays back that lie in the body."""
    for number, record, held in arrays:
        if number == which:
            there = [(n, over(dtype, tuple(shape), body[a : a + k], s)) for n, dtype, shape, s, a, k in held]
            content[record] = gather(there)
    return content


def _rest(content: RecordDict) -> RecordDict:
    return RecordDict({name: held for name, held in content.items() if not isinstance(held, ArrayRecord)})


def _sha256(parts: Sequence[bytes | memoryview]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()
