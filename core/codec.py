"""How a trained adapter travels (`federation.upload`): whole, or as its difference to the adapter that was sent.

bfloat16: the upper half of each float32 of the difference, rounded to nearest. int8: symmetric codes −127 … 127 in
groups of 64 with one scale each, a bfloat16 that is rounded up, so that no code leaves its range. What rounding leaves
behind is remembered by the client and added to its next update of the same subspace: error feedback (Seide et al.
2014; Karimireddy et al. 2019, arXiv 1901.09847), so that nothing is lost over rounds.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedstrata.core.adapters import Flat
from fedstrata.core.streaming import blocks

FLAT, HALF, CODES, SCALES = "flat", "flat.bfloat16", "flat.int8", "flat.scales"
GROUP = 64  # values that share a scale
LARGEST = 127
INFINITE = 0x7F80  # bits of bfloat16's infinity; whatever is above is no number either
STEP = 256 * GROUP  # numbers per block, so that temporaries stay in the cache

Parts = Mapping[str, npt.NDArray[Any]]


def declared(kind: str, size: int) -> dict[str, tuple[str, int]]:
    """{array: (dtype, length)} of an adapter of `size` numbers that is uploaded as `kind`."""
    if kind == "bfloat16":
        return {HALF: ("uint16", size)}
    if kind == "int8":
        return {CODES: ("int8", size), SCALES: ("uint16", math.ceil(size / GROUP))}
    return {FLAT: ("float32", size)}


def nbytes(kind: str, size: int) -> int:
    """Bytes of an adapter of `size` numbers that is uploaded as `kind`."""
    return sum(np.dtype(dtype).itemsize * length for dtype, length in declared(kind, size).values())


def encode(flat: Flat, start: Flat, residual: Flat | None, kind: str) -> tuple[dict[str, npt.NDArray[Any]], Flat]:
    """What is uploaded of a trained adapter [P], and the new residual [P]: what the server will not have seen.

    start: the adapter that was sent; residual: what earlier roundings left behind, None for nothing. An adapter that
    is not finite leaves nothing behind: the server will refuse it.
    """
    if kind not in ("bfloat16", "int8"):
        raise ValueError(f"an encoding must be bfloat16 or int8, got {kind!r}")
    parts = {name: np.empty(size, dtype) for name, (dtype, size) in declared(kind, flat.size).items()}
    left = np.empty(flat.size, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for block in blocks(flat.size, STEP):
            wanted, cut = flat[block] if residual is None else flat[block] + residual[block], _cut(parts, block)
            _round(wanted - start[block], cut)
            left[block] = wanted - (start[block] + _difference(cut))
    return parts, left if np.isfinite(left).all() else np.zeros_like(left)


def restore(start: Flat, parts: Parts, factor: float = 1.0, out: Flat | None = None) -> Flat:
    """start + factor · difference, float32 [P]: the adapter that `parts` stand for; into `out` where it is given.

    The difference of an adapter that travelled whole is taken to `start`. Numbers that cannot be come out as NaN or
    infinity; the server's gate looks at the result.
    """
    out = np.empty(start.size, dtype=np.float32) if out is None else out
    with np.errstate(over="ignore", invalid="ignore"):
        for block in blocks(start.size, STEP):
            begin, cut = start[block], _cut(parts, block)
            if FLAT in cut:
                whole = begin.astype(np.float64)
                out[block] = whole + (cut[FLAT] - whole) * factor
            else:
                out[block] = begin + _difference(cut) * np.float32(factor)
    return out


def finite(scales: npt.NDArray[np.uint16]) -> bool:
    """Whether all scales are numbers; none may be negative."""
    return bool((scales < INFINITE).all())


def _cut(parts: Parts, block: slice) -> dict[str, npt.NDArray[Any]]:
    """Views of one block, which begins and ends with a group."""
    groups = slice(block.start // GROUP, -(-block.stop // GROUP))
    return {name: part[groups if name == SCALES else block] for name, part in parts.items()}


def _round(difference: Flat, parts: Parts) -> None:
    """Writes one block of a difference into its parts."""
    if HALF in parts:
        parts[HALF][:] = _halve(difference)
        return
    groups = np.zeros((len(parts[SCALES]), GROUP), dtype=np.float32)
    groups.reshape(-1)[: difference.size] = difference
    parts[SCALES][:] = _halve(np.abs(groups).max(axis=1) / np.float32(LARGEST), up=True)
    scales = _widen(parts[SCALES])[:, None]
    np.divide(groups, scales, out=groups, where=scales > 0)
    np.rint(groups, out=groups)
    parts[CODES][:] = groups.reshape(-1)[: difference.size]


def _difference(parts: Parts) -> Flat:
    """The inverse of `_round` for one block."""
    if HALF in parts:
        return _widen(parts[HALF])
    codes = np.zeros((len(parts[SCALES]), GROUP), dtype=np.float32)
    codes.reshape(-1)[: len(parts[CODES])] = parts[CODES]
    codes *= _widen(parts[SCALES])[:, None]
    return np.asarray(codes.reshape(-1)[: len(parts[CODES])], dtype=np.float32)


def _halve(values: Flat, up: bool = False) -> npt.NDArray[np.uint16]:
    """The bits of bfloat16: to nearest, ties to even; up: away from zero."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    if up:
        return ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _widen(halves: npt.NDArray[np.uint16]) -> Flat:
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
