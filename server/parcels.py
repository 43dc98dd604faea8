"""What travels between the server and its actors: messages pickled once, their arrays beside them and not in between.

Ray puts the buffers of a parcel into shared memory as they are, and hands them out again without a copy. Array
records that the server sends are known by number: each is shipped once, whoever many clients get it.
"""

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord

APART = 1 << 12  # bytes from which an array travels beside the pickle


@dataclass(frozen=True)
class Parcel:
    """A pickle, and the buffers that it refers to."""

    head: bytes
    buffers: Sequence[Any] = ()


def pack(value: Any, number: Callable[[ArrayRecord], int] | None = None) -> Parcel:
    """`number`: gives the number under which an ArrayRecord is known to who unpacks; None: records go along."""
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    pickler = _Numbering(stream, number, buffers.append) if number else _Pickler(stream, buffers.append)
    pickler.dump(value)
    return Parcel(stream.getvalue(), buffers)


def unpack(parcel: Parcel, known: Callable[[int], ArrayRecord] | None = None, lend: bool = False) -> Any:
    """The value. `known`: the record of a number.

    lend: large arrays stay in the parcel's memory, which they hold on to; else they are copies of their own.
    """
    buffers = parcel.buffers if lend else [bytes(buffer) for buffer in parcel.buffers]
    return _Unpickler(parcel.head, buffers, known).load()


class _Pickler(pickle.Pickler):
    """Arrays of some size leave their bytes to the buffers."""

    def __init__(self, stream: io.BytesIO, keep: Callable[[pickle.PickleBuffer], Any]) -> None:
        super().__init__(stream, protocol=5, buffer_callback=keep)
        self.dispatch_table = {ArrayRecord: _reduced}


class _Numbering(_Pickler):
    """Array records leave their number."""

    def __init__(
        self,
        stream: io.BytesIO,
        number: Callable[[ArrayRecord], int],
        keep: Callable[[pickle.PickleBuffer], Any],
    ) -> None:
        super().__init__(stream, keep)
        self._number = number

    def persistent_id(self, obj: Any) -> int | None:
        return self._number(obj) if type(obj) is ArrayRecord else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, head: bytes, buffers: Sequence[Any], known: Callable[[int], ArrayRecord] | None) -> None:
        super().__init__(io.BytesIO(head), buffers=buffers)
        self._known, self._mine = known, dict[int, ArrayRecord]()

    def persistent_load(self, pid: int) -> ArrayRecord:
        """One record for all messages of this parcel, but not for those of the next one."""
        if self._known is None:
            raise pickle.UnpicklingError(f"array record {pid} is not in the parcel")
        if pid not in self._mine:
            self._mine[pid] = self._known(pid).copy()
        return self._mine[pid]


def _reduced(record: ArrayRecord) -> tuple[Any, ...]:
    """Names, types, shapes and lengths; the bytes of large arrays one by one, those of small ones in one row."""
    arrays = list(record.values())
    datas = [array.data for array in arrays]
    row = b"".join([data for data in datas if len(data) < APART])
    large = [pickle.PickleBuffer(data) for data in datas if len(data) >= APART]
    facts = [(array.dtype, array.shape, array.stype, len(array.data)) for array in arrays]
    return _record, (list(record), facts, pickle.PickleBuffer(row) if len(row) >= APART else row, large)


def _record(names: list[str], facts: list[tuple[str, tuple[int, ...], str, int]], row: Any, large: list[Any]) -> Any:
    record, rest, view, at = ArrayRecord(), iter(large), memoryview(row), 0
    found = record.__dict__["_data"]
    for name, (dtype, shape, stype, length) in zip(names, facts, strict=True):
        data = next(rest) if length >= APART else bytes(view[at : at + length])
        at += 0 if length >= APART else length
        array = found[name] = Array.__new__(Array)
        array.__dict__.update(dtype=dtype, shape=shape, stype=stype, data=data)
    return record
