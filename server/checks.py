"""What a reply may be refused for: a closed list of kinds, and the single checks that the gate is made of."""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array

MOST = 1e15  # of a number in an array; the difference of two that are near float32's largest is infinite


class Kind(StrEnum):
    """Why a reply was not used; counted in the summary."""

    FAILED = "failed"  # the client said so
    TOO_FEW = "too few"  # the client said that it holds too few instructions for a token; no fault of its own
    SILENT = "silent"  # an error that it did not sign, of Flower's making or anybody's: it said nothing
    LATE = "late"  # it did not come in time, or came for an exchange that is over
    UNREADABLE = "unreadable"  # cannot be decoded
    SCHEMA = "schema"  # records or keys are missing, or there are too many
    BINDING = "binding"  # belongs to another run, stage, round or client
    SHAPE = "shape"  # type, shape or size of an array
    NOT_FINITE = "not finite"
    COUNT = "count"  # not the number of examples that the client is known to hold
    RANGE = "range"  # a number that cannot be
    NORM = "norm"  # the update is far larger than those before it
    SIGNATURE = "signature"  # not signed by the client that was asked, or not for this message
    DUPLICATE = "duplicate"  # a second answer to one question


class Refused(ValueError):
    """A reply may not enter; says of which kind the reason is."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def check(holds: bool, kind: Kind, reason: str) -> None:
    """Raises `Refused` unless the rule `holds`."""
    if not holds:
        raise Refused(kind, reason)


def declared(array: Array, *shape: int, dtype: str = "float32") -> None:
    """Checked on the declaration, before anything is decoded: a header may claim gigabytes."""
    most = np.dtype(dtype).itemsize * math.prod(shape) + 1024
    good = array.dtype == dtype and tuple(array.shape) == shape and len(array.data) <= most
    came = f"{array.dtype} {tuple(array.shape)} in {len(array.data)} bytes"
    check(good, Kind.SHAPE, f"array: must be {dtype} {shape}, got {came}")


def decoded(values: npt.NDArray[Any], *shape: int, dtype: str = "float32") -> None:
    """The bytes carry a header of their own, which need not be what was declared."""
    good = values.dtype == np.dtype(dtype) and values.shape == shape
    check(good, Kind.SHAPE, f"array: must be {dtype} {shape}, got {values.dtype} {values.shape}")
    most = max(float(values.max()), -float(values.min())) if values.size else 0.0  # NaN and infinity show in both
    check(math.isfinite(most), Kind.NOT_FINITE, "array: must be finite, got NaN or infinity")
    check(most <= MOST, Kind.RANGE, f"array: must be at most {MOST:g} in size, got {most:.4g}")


def counted(count: object, samples: int) -> None:
    """`count` as it came: Flower's own strategies weigh by it, and 10.5 is not 10."""
    rule = f"num-examples: must be {samples}, the client's known share, got {count}"
    check(type(count) is int and count == samples, Kind.COUNT, rule)


def keys(came: Mapping[str, list[str]], want: Mapping[str, list[str]]) -> None:
    check(came == want, Kind.SCHEMA, f"records: must be {want}, got {came}")


def finite(name: str, value: float) -> None:
    check(bool(np.isfinite(value)), Kind.NOT_FINITE, f"{name}: must be finite, got {value}")


def between(name: str, value: float, low: float, high: float) -> None:
    check(low <= value <= high, Kind.RANGE, f"{name}: must be between {low:g} and {high:g}, got {value!r}")
