"""numpy arrays ↔ Flower's `Array`, whose bytes are those of a .npy file, without copies that nobody needs."""

import io
import mmap
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy

NUMPY = "numpy.ndarray"  # Flower's name of this serialisation
READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
HEADER = 16384  # a header is 128 bytes long; numpy refuses one above 10,000

Buffer = bytes | bytearray | memoryview | mmap.mmap


def pack(value: npt.NDArray[Any]) -> Array:
    """What `Array(value)` gives, byte for byte, in one copy."""
    value = np.require(value, requirements="C")
    return Array(str(value.dtype), tuple(value.shape), NUMPY, b"".join((_header(value), value.data)))


def view(array: Array) -> npt.NDArray[Any]:
    """What `array.numpy()` gives, without a copy; it may be read only and lives as long as the array's bytes.

    Raises:
        ValueError: the bytes are no .npy file, or hold less than their header says.
    """
    if array.stype != NUMPY:
        raise ValueError(f"an array must be serialised as {NUMPY}, got {array.stype!r}")
    shape, fortran, dtype, begin = _read_header(bytes(memoryview(array.data)[: _length(array.data)]))
    flat = np.frombuffer(array.data, dtype, int(np.prod(shape, dtype=np.int64)), begin)
    return flat.reshape(shape, order="F" if fortran else "C")


def _length(data: Buffer) -> int:
    """Of the header: 10 or 12 bytes, of which the last ones say how many follow; never more than `HEADER`."""
    begin = memoryview(data)[:12].tobytes()
    short = begin[6:7] == b"\x01"
    told = int.from_bytes(begin[8:10] if short else begin[8:12], "little")
    return min(HEADER, told + (10 if short else 12))


@lru_cache(maxsize=256)
def _read_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran's order, type, and where the numbers begin; equal headers are parsed once."""
    file = io.BytesIO(header)
    version = npy.read_magic(file)
    if version not in READERS:
        raise ValueError(f"an array's bytes must be of .npy version 1 or 2, got {version}")
    shape, fortran, dtype = READERS[version](file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects is not read")
    return shape, fortran, dtype, file.tell()


def over(dtype: str, shape: tuple[int, ...], data: Buffer, stype: str = NUMPY) -> Array:
    """An `Array` over bytes that lie elsewhere, in a mapped file for example."""
    array = Array(dtype, shape, stype, b"")
    array.data = cast(bytes, data)
    return array


def gather(arrays: Iterable[tuple[str, Array]]) -> ArrayRecord:
    """A record of these arrays; Flower's constructor would take none whose bytes lie elsewhere."""
    record = ArrayRecord()
    for name, array in arrays:
        record[name] = array
    return record


def owned(record: ArrayRecord) -> ArrayRecord:
    """The same arrays with bytes of their own, wherever they lie: what Flower can serialise again."""
    return ArrayRecord({n: Array(a.dtype, a.shape, a.stype, bytes(a.data)) for n, a in record.items()})


def vector(size: int) -> tuple[Array, npt.NDArray[np.float32]]:
    """An `Array` of float32 [size] and the numbers in it, to be filled in: there is no second copy of them."""
    header = _header(np.empty(0, dtype=np.float32), (size,))
    data = np.zeros(len(header) + 4 * size, dtype=np.uint8)
    data[: len(header)] = np.frombuffer(header, dtype=np.uint8)
    return over("float32", (size,), data.data), data[len(header) :].view(np.float32)


def _header(value: npt.NDArray[Any], shape: tuple[int, ...] | None = None) -> bytes:
    file = io.BytesIO()
    fields = npy.header_data_from_array_1_0(value)
    npy.write_array_header_1_0(file, {**fields, "shape": value.shape if shape is None else shape})
    return file.getvalue()
