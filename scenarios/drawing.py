"""Deterministic drawing on 32 x 32 pictures: uint8 arrays [32, 32, 3] and boolean masks [32, 32].

Only comparisons of exactly representable numbers decide which pixel is painted, so the same call gives the same bytes
on every machine. Coordinates are pixels, x to the right and y downwards, the centre of the first pixel at (0, 0).
"""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

SIZE = 32
"""Pixels along each side of a picture."""

Array = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Colour = tuple[int, int, int]

COLOURS: Mapping[str, Colour] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (30, 60, 220),
    "yellow": (240, 215, 20),
    "purple": (140, 40, 170),
    "orange": (245, 135, 15),
}

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.int64)


def canvas(colour: Colour) -> Array:
    """A picture filled with one colour."""
    picture = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    picture[:] = colour
    return picture


def paint(picture: Array, mask: Mask, colour: Colour) -> None:
    """Colours the masked pixels of `picture`, in place."""
    np.copyto(picture, np.array(colour, dtype=np.uint8), where=mask[..., None])


def shape(kind: str, x: int, y: int, radius: int) -> Mask:
    """A filled shape named in `SHAPES`, centred on (x, y), reaching about `radius` pixels from there."""
    return SHAPES[kind](_X - x, _Y - y, radius)


def _circle(x: NDArray[np.int64], y: NDArray[np.int64], r: int) -> Mask:
    return x * x + y * y <= r * r


def _square(x: NDArray[np.int64], y: NDArray[np.int64], r: int) -> Mask:
    return 8 * np.maximum(abs(x), abs(y)) <= 7 * r


def _triangle(x: NDArray[np.int64], y: NDArray[np.int64], r: int) -> Mask:
    return (2 * abs(x) <= y + r) & (y <= r)


def _diamond(x: NDArray[np.int64], y: NDArray[np.int64], r: int) -> Mask:
    return abs(x) + abs(y) <= r


def _cross(x: NDArray[np.int64], y: NDArray[np.int64], r: int) -> Mask:
    return (3 * np.minimum(abs(x), abs(y)) <= r) & (np.maximum(abs(x), abs(y)) <= r)


def _ring(x: NDArray[np.int64], y: NDArray[np.int64], r: int) -> Mask:
    return (x * x + y * y <= r * r) & (9 * (x * x + y * y) >= 3 * r * r)


def _saltire(x: NDArray[np.int64], y: NDArray[np.int64], r: int) -> Mask:
    return (3 * abs(abs(x) - abs(y)) <= r) & (np.maximum(abs(x), abs(y)) <= r)


def _bowl(x: NDArray[np.int64], y: NDArray[np.int64], r: int) -> Mask:
    return (x * x + y * y <= r * r) & (y >= 0)


SHAPES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
    "saltire": _saltire,
    "bowl": _bowl,
}


def box(left: int, top: int, right: int, bottom: int) -> Mask:
    """A filled rectangle; all four borders belong to it."""
    mask = np.zeros((SIZE, SIZE), dtype=np.bool_)
    mask[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = True
    return mask


def segment(start: tuple[int, int], end: tuple[int, int], width: int = 2) -> Mask:
    """The pixels within `width / 2` of the straight line between two points."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    px, py = _X - start[0], _Y - start[1]
    length = dx * dx + dy * dy
    along = px * dx + py * dy
    beside = 4 * (px * dy - py * dx) ** 2 <= width * width * max(length, 1)
    inside = (along >= 0) & (along <= length) & beside
    ends = [4 * ((_X - x) ** 2 + (_Y - y) ** 2) <= width * width for x, y in (start, end)]
    mask: Mask = inside | ends[0] | ends[1]
    return mask


def polyline(points: Sequence[tuple[int, int]], width: int = 2) -> Mask:
    """Segments from each point to the next."""
    mask = np.zeros((SIZE, SIZE), dtype=np.bool_)
    for start, end in pairwise(points):
        mask |= segment(start, end, width)
    return mask


@cache
def glyph(letter: str) -> Mask:
    """One character of Pillow's built-in bitmap font, cropped to its ink: [height, width]."""
    mask = ImageFont.load_default_imagefont().getmask(letter)
    pixels = np.array(mask, dtype=np.uint8).reshape(mask.size[1], mask.size[0]) > 0
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    cropped: Mask = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return cropped


def stamp(pattern: Mask, x: int, y: int, scale: int = 1) -> Mask:
    """`pattern` [h, w] enlarged `scale` times with its top left corner at (x, y); what falls outside is cut off."""
    big = pattern.repeat(scale, 0).repeat(scale, 1)
    mask = np.zeros((SIZE, SIZE), dtype=np.bool_)
    top, left = max(y, 0), max(x, 0)
    part = big[top - y : SIZE - y, left - x : SIZE - x]
    mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return mask


def blend(paper: Colour, ink: Colour, amount: NDArray[np.int64]) -> Array:
    """A picture whose pixels lie between two colours: `amount` [32, 32] is 0 (paper) to 16 (ink)."""
    a = amount[..., None]
    return ((np.array(paper) * (16 - a) + np.array(ink) * a) // 16).astype(np.uint8)
