"""The form of a kept reply: one file that is written in one pass and read through the system's page cache.

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

    def load(self) -> list[RecordDict]:
        """What was written. Raises OSError when the file is gone."""
        dicts = [RecordDict(dict(rest.items())) for rest in self.rests]
        return _filled(dicts, self.arrays, _map(self.path)[self.begin :])


def write(path: Path, head: Mapping[str, Any], dicts: Sequence[RecordDict]) -> Slot:
    """Writes some records under a head; after a power cut the file may be gone. Raises OSError when it does not fit."""
    rests = [_rest(content) for content in dicts]
    parts = [recorddict_to_proto(rest).SerializeToString() for rest in rests]
    lengths = [len(part) for part in parts]
    table: list[tuple[int, str, list[Any]]] = []
    for number, content in enumerate(dicts):
        for record, held in content.items():
            if not isinstance(held, ArrayRecord):
                continue
            table.append((number, record, []))
            for name, array in held.items():
                parts.append(b"\0" * (-sum(map(len, parts)) % ALIGN))
                begin = sum(map(len, parts))
                table[-1][2].append([name, array.dtype, list(array.shape), array.stype, begin, len(array.data)])
                parts.append(array.data)
    found = {**head, "records": lengths, "arrays": table, "sha256": _sha256(parts)}
    line = json.dumps(found, sort_keys=True).encode()
    line += b" " * (-(len(line) + 1) % ALIGN) + b"\n"
    durable.write_atomic(path, line, *parts, flush=False)
    return Slot(path, len(line), table, rests)


def read(path: Path, head: Mapping[str, Any]) -> list[RecordDict]:
    """What was written under this head. Raises OSError, ValueError, KeyError or TypeError when that is not there."""
    line, body = _open(path)
    found = json.loads(line)
    if any(found[key] != value for key, value in head.items()) or found["sha256"] != _sha256([body]):
        raise ValueError(f"{path.name}: is not what was written")
    return _records(found, body)


def again(path: Path) -> list[RecordDict]:
    """What this process has written or verified before. Raises OSError when the file is gone."""
    line, body = _open(path)
    return _records(json.loads(line), body)


def _open(path: Path) -> tuple[bytes, memoryview]:
    data = _map(path)
    line = bytes(data[: cast(mmap.mmap, data.obj).find(b"\n") + 1])
    return line, data[len(line) :]


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _records(found: Mapping[str, Any], body: memoryview) -> list[RecordDict]:
    dicts, begin = [], 0
    for length in found["records"]:
        dicts.append(recorddict_from_proto(Proto.FromString(bytes(body[begin : begin + length]))))
        begin += length
    return _filled(dicts, found["arrays"], body)


def _filled(dicts: list[RecordDict], arrays: Sequence[Sequence[Any]], body: memoryview) -> list[RecordDict]:
    """Puts the arrays back that lie in the body."""
    for number, record, held in arrays:
        views = [(name, over(dtype, tuple(shape), body[a : a + n], stype)) for name, dtype, shape, stype, a, n in held]
        dicts[number][record] = gather(views)
    return dicts


def _rest(content: RecordDict) -> RecordDict:
    return RecordDict({name: held for name, held in content.items() if not isinstance(held, ArrayRecord)})


def _sha256(parts: Sequence[bytes | memoryview]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()
