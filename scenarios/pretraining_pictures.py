"""The pictures of the pre-training tasks: each function gives (picture [32, 32, 3], the prompt's words, answer)."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedstrata.scenarios import drawing

Rng = np.random.Generator
Drawn = tuple[drawing.Array, dict[str, str], str]

LETTERS = "EFGHIJKLMNOPQRSTUVWXYZ"
SYMBOLS = LETTERS + "abdefghijkmnqrty" + "?&+<>=#%"
NAMES = tuple(drawing.COLOURS)
KINDS = tuple(drawing.SHAPES)
SIZES: Mapping[str, int] = {"tiny": 3, "medium": 5, "huge": 8}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
TEXTURES = ("plain", "striped", "ruled", "slanted", "checked", "speckled")
DIRECTIONS: Mapping[str, tuple[int, int]] = {
    "north": (0, -1),
    "northeast": (1, -1),
    "east": (1, 0),
    "southeast": (1, 1),
    "south": (0, 1),
    "southwest": (-1, 1),
    "west": (-1, 0),
    "northwest": (-1, -1),
}


def pick(rng: Rng, count: int) -> int:
    return int(rng.integers(count))


def _paper(rng: Rng) -> drawing.Colour:
    """A pale paper; its red channel is 1 modulo 4."""
    return (4 * pick(rng, 14) + 201, 201 + pick(rng, 54), 201 + pick(rng, 54))


def _ink(rng: Rng) -> drawing.Colour:
    return (pick(rng, 130), pick(rng, 110), pick(rng, 140))


def _objects(rng: Rng, count: int) -> list[tuple[int, str, str, str]]:
    """`count` objects in different cells of a 3 x 3 board: (cell, kind, colour, size)."""
    cells = sorted(int(cell) for cell in rng.permutation(9)[:count])
    sizes = tuple(SIZES)
    return [(cell, KINDS[pick(rng, 8)], NAMES[pick(rng, 6)], sizes[pick(rng, 3)]) for cell in cells]


def _board(rng: Rng, objects: list[tuple[int, str, str, str]]) -> drawing.Array:
    picture = drawing.canvas(_paper(rng))
    for cell, kind, colour, size in sorted(objects, key=lambda thing: -SIZES[thing[3]]):
        x, y = (5 + 11 * place + pick(rng, 3) - 1 for place in (cell % 3, cell // 3))
        drawing.paint(picture, drawing.shape(kind, x, y, SIZES[size] + pick(rng, 2)), drawing.COLOURS[colour])
    return picture


def _place(cell: int) -> str:
    return f"{ROWS[cell // 3]} {COLUMNS[cell % 3]}"


def inventory(rng: Rng) -> Drawn:
    objects = _objects(rng, 1 + pick(rng, 4))
    text = "; ".join(f"{_place(cell)} {size} {kind} {colour}" for cell, kind, colour, size in objects)
    return _board(rng, objects), {}, text


def kind(rng: Rng) -> Drawn:
    objects = _objects(rng, 2 + pick(rng, 3))
    cell, kind, _, _ = objects[pick(rng, len(objects))]
    return _board(rng, objects), {"place": _place(cell)}, kind


def where(rng: Rng) -> Drawn:
    objects = _objects(rng, 2 + pick(rng, 2))
    kind = objects[pick(rng, len(objects))][1]
    same = [other for other, what, _, _ in objects if what == kind]
    return _board(rng, objects), {"kind": kind}, _place(same[0])


def size(rng: Rng) -> Drawn:
    objects = _objects(rng, 2 + pick(rng, 2))
    kind = objects[pick(rng, len(objects))][1]
    first = next(thing for thing in objects if thing[1] == kind)
    return _board(rng, objects), {"kind": kind}, first[3]


def extreme(rng: Rng) -> Drawn:
    """Two objects of different size: what kind is the one of the wanted size?"""
    objects = _objects(rng, 2)
    big = pick(rng, 2)
    sizes = (
        ("huge", "tiny") if rng.random() < 0.5 else (("huge", "medium") if rng.random() < 0.5 else ("medium", "tiny"))
    )
    objects = [(c, k, n, sizes[i != big]) for i, (c, k, n, _) in enumerate(objects)]
    wanted = pick(rng, 2)
    return (
        _board(rng, objects),
        {"which": ("dominant", "slightest")[wanted]},
        objects[big if not wanted else 1 - big][1],
    )


def share(rng: Rng) -> Drawn:
    """Two objects one above the other: what they have in common."""
    kind, colour = pick(rng, 8), pick(rng, 6)
    same_kind, same_colour = rng.random() < 0.5, rng.random() < 0.5
    other = kind if same_kind else (kind + 1 + pick(rng, 7)) % 8
    paint = colour if same_colour else (colour + 1 + pick(rng, 5)) % 6
    picture, radius = drawing.canvas(_paper(rng)), 5 + pick(rng, 3)
    spots = (((8, 8), (24, 24)), ((8, 24), (24, 8)), ((16, 8), (16, 24)))[pick(rng, 3)]
    for (x, y), what, name in zip(spots, (kind, other), (colour, paint), strict=True):
        mask = drawing.shape(KINDS[what], x + pick(rng, 3) - 1, y + pick(rng, 3) - 1, radius)
        drawing.paint(picture, mask, drawing.COLOURS[NAMES[name]])
    return picture, {}, ("nothing", "paint", "outline", "everything")[2 * same_kind + same_colour]


def texture(rng: Rng) -> Drawn:
    step, ink, which = 3 + pick(rng, 4), _ink(rng), pick(rng, 6)
    picture, (y, x) = drawing.canvas(_paper(rng)), np.mgrid[0 : drawing.SIZE, 0 : drawing.SIZE] + pick(rng, 4)
    half = step // 2 + 1
    masks = (
        x < 0,
        x % (2 * step) < half,
        y % (2 * step) < half,
        (x + y) % (2 * step) < half,
        ((x // step) + (y // step)) % 2 == 0,
        (x % step == 0) & (y % step == 0),
    )
    drawing.paint(picture, masks[which], ink)
    return picture, {}, TEXTURES[which]


def backdrop(rng: Rng) -> Drawn:
    """One object on a strongly coloured ground."""
    ground, colour = rng.permutation(6)[:2]
    red, green, blue = drawing.COLOURS[NAMES[ground]]
    picture = drawing.canvas((red // 4 * 4 + 1, green, blue))
    mask = drawing.shape(KINDS[pick(rng, 8)], 9 + pick(rng, 14), 9 + pick(rng, 14), 4 + pick(rng, 5))
    drawing.paint(picture, mask, drawing.COLOURS[NAMES[colour]])
    return picture, {}, NAMES[ground]


def walk(rng: Rng) -> Drawn:
    """A pen line over a grid of eight-pixel steps, told as compass directions from the blob at its start."""
    names = tuple(DIRECTIONS)
    x, y, told = pick(rng, 5), pick(rng, 5), list[str]()
    points = [(x, y)]
    while len(told) < 2 + len(points) % 2 and len(told) < 4:
        name = names[pick(rng, 8)]
        dx, dy = DIRECTIONS[name]
        if 0 <= x + dx < 5 and 0 <= y + dy < 5 and (x + dx, y + dy) not in points:
            x, y = x + dx, y + dy
            points.append((x, y))
            told.append(name)
    picture, ink = drawing.canvas(_paper(rng)), _ink(rng)
    ends = [(2 + 7 * px, 2 + 7 * py) for px, py in points]
    drawing.paint(picture, drawing.polyline(ends, 2 + pick(rng, 2)) | drawing.shape("circle", *ends[0], 3), ink)
    return picture, {}, " ".join(told)


def slope(rng: Rng) -> Drawn:
    """A wandering line, told as its level (1 low .. 8 high) at five places."""
    levels = np.clip(np.cumsum(rng.integers(-3, 4, size=5)) + 1 + pick(rng, 8), 1, 8)
    points = [(1 + 7 * i + (i > 3), 31 - 4 * int(level) + 2) for i, level in enumerate(levels)]
    picture = drawing.canvas(_paper(rng))
    drawing.paint(picture, drawing.polyline(points, 1 + pick(rng, 3)), _ink(rng))
    return picture, {}, " ".join(str(level) for level in levels)


def skyline(rng: Rng) -> Drawn:
    """Two, three, five or six towers, told as their storeys from left to right."""
    count = (2, 3, 5, 6)[pick(rng, 4)]
    width, foot = drawing.SIZE // count, 27 + pick(rng, 5)
    storeys = [1 + pick(rng, 8) for _ in range(count)]
    picture, ink = drawing.canvas(_paper(rng)), _ink(rng)
    for i, height in enumerate(storeys):
        left = i * width + pick(rng, 2)
        drawing.paint(picture, drawing.box(left, foot - 3 * height, left + width - 2 - pick(rng, 2), foot), ink)
    return picture, {}, " ".join(map(str, storeys))


def peak(rng: Rng) -> Drawn:
    """Lines lying on top of each other; which one reaches furthest."""
    names = ("upper", "central", "lower")
    lengths = 4 + rng.integers(0, 18, size=3)
    longest = pick(rng, 3)
    lengths[longest] = max(np.delete(lengths, longest)) + 2 + pick(rng, 4)
    picture, left, ink = drawing.canvas(_paper(rng)), 1 + pick(rng, 4), _ink(rng)
    for i, length in enumerate(lengths):
        y = 3 + 10 * i + pick(rng, 4)
        drawing.paint(picture, drawing.box(left, y, left + int(length), y + 1 + pick(rng, 4)), ink)
    return picture, {}, names[longest]


def beads(rng: Rng) -> Drawn:
    """Small marks in an 4 x 4 tray, told row by row."""
    tray = rng.random((4, 4)) < (0.1 + 0.5 * rng.random())
    picture, ink = drawing.canvas(_paper(rng)), _ink(rng)
    kind = ("circle", "square", "diamond", "cross")[pick(rng, 4)]
    for row, column in np.argwhere(tray):
        x, y = 8 * int(column) + 3 + pick(rng, 2), 8 * int(row) + 3 + pick(rng, 2)
        drawing.paint(picture, drawing.shape(kind, x, y, 2 + pick(rng, 2)), ink)
    return picture, {}, " ".join(str(int(number)) for number in tray.sum(1))


def spelling(rng: Rng) -> Drawn:
    """Two large or four narrow characters, none of them A to D."""
    count = 2 if rng.random() < 0.75 else 4
    letters = [LETTERS[pick(rng, len(LETTERS))] for _ in range(count)]
    picture, ink = drawing.canvas(_paper(rng)), _ink(rng)
    wide, top = 4 // count, 1 + pick(rng, 18)
    tall = 2 if count == 2 else 1 + pick(rng, 2)
    for i, letter in enumerate(letters):
        pattern = drawing.glyph(letter).repeat(tall, 0).repeat(wide, 1)
        drawing.paint(picture, drawing.stamp(pattern, i * (drawing.SIZE // count) + 1 + pick(rng, 3), top), ink)
    return picture, {}, " ".join(letters)


def _warped(rng: Rng, pattern: drawing.Mask) -> NDArray[np.int64]:
    """A glyph under a random bent map, as ink 0..16 on 8 x 8 cells of 4 x 4 pixels: [32, 32]."""
    v, u = (np.mgrid[0:32, 0:32] + 0.5) / 16 - 1
    terms = np.stack([np.ones_like(u), u, v, u * v, u * u, v * v, u * u * v, u * v * v])
    spread = np.array([0.05, 0.16, 0.16, 0.07, 0.07, 0.07, 0.07, 0.07])
    bend = rng.normal(0, 1, (2, 8)) * spread
    bend[0, 1] += 1.15 + 0.5 * rng.random()
    bend[1, 2] += 1.1 + 0.15 * rng.random()
    x, y = np.tensordot(bend, terms, 1)
    height, width = pattern.shape
    rows, columns = np.floor((y + 1) * height / 2).astype(int), np.floor((x + 1) * width / 2).astype(int)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    ink = pattern[rows.clip(0, height - 1), columns.clip(0, width - 1)] & inside
    cells = ink.reshape(8, 4, 8, 4).sum((1, 3))
    blurred: NDArray[np.int64] = cells.repeat(4, 0).repeat(4, 1)
    return blurred


def signature(rng: Rng) -> Drawn:
    """One symbol written askew and blurred."""
    symbol = SYMBOLS[pick(rng, len(SYMBOLS))]
    return drawing.blend(_paper(rng), _ink(rng), _warped(rng, drawing.glyph(symbol))), {}, symbol
