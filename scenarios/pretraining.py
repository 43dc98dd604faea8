"""The *other* tasks a tiny base is pre-trained on, so that its vision tower and projector see shapes, colours, places,
sizes, strokes, glyphs and heights before they are frozen.

None of fcit-mini's eight tasks occurs here: other prompts, other question forms, other pictures. Papers (background
colours) have red channels that leave remainder one when divided by four, fcit-mini's leave none, so no picture can
occur in both. The letters A to D, real handwriting, four-bar charts, the words yes and no and whole captions are never
asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedstrata.core.seeds import generator
from fedstrata.scenarios import drawing
from fedstrata.scenarios.stream import Example, Pixels

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


@dataclass(frozen=True)
class _Maker:
    """`draw(rng)` gives (picture, the prompt's slot words, answer); `weight` is its share of the examples."""

    prompts: tuple[str, ...]
    draw: Callable[[Rng], Drawn]
    weight: float = 1.0


def _pick(rng: Rng, count: int) -> int:
    return int(rng.integers(count))


def _paper(rng: Rng) -> drawing.Colour:
    """A pale paper; its red channel is 1 modulo 4."""
    return (4 * _pick(rng, 14) + 201, 201 + _pick(rng, 54), 201 + _pick(rng, 54))


def _ink(rng: Rng) -> drawing.Colour:
    return (_pick(rng, 130), _pick(rng, 110), _pick(rng, 140))


def _objects(rng: Rng, count: int) -> list[tuple[int, str, str, str]]:
    """`count` objects in different cells of a 3 x 3 board: (cell, kind, colour, size)."""
    cells = sorted(int(cell) for cell in rng.permutation(9)[:count])
    sizes = tuple(SIZES)
    return [(cell, KINDS[_pick(rng, 8)], NAMES[_pick(rng, 6)], sizes[_pick(rng, 3)]) for cell in cells]


def _board(rng: Rng, objects: list[tuple[int, str, str, str]]) -> drawing.Array:
    picture = drawing.canvas(_paper(rng))
    for cell, kind, colour, size in sorted(objects, key=lambda thing: -SIZES[thing[3]]):
        x, y = (5 + 11 * place + _pick(rng, 3) - 1 for place in (cell % 3, cell // 3))
        drawing.paint(picture, drawing.shape(kind, x, y, SIZES[size] + _pick(rng, 2)), drawing.COLOURS[colour])
    return picture


def _place(cell: int) -> str:
    return f"{ROWS[cell // 3]} {COLUMNS[cell % 3]}"


def _inventory(rng: Rng) -> Drawn:
    objects = _objects(rng, 1 + _pick(rng, 4))
    text = "; ".join(f"{_place(cell)} {size} {kind} {colour}" for cell, kind, colour, size in objects)
    return _board(rng, objects), {}, text


def _kind(rng: Rng) -> Drawn:
    objects = _objects(rng, 2 + _pick(rng, 3))
    cell, kind, _, _ = objects[_pick(rng, len(objects))]
    return _board(rng, objects), {"place": _place(cell)}, kind


def _where(rng: Rng) -> Drawn:
    objects = _objects(rng, 2 + _pick(rng, 2))
    cell, kind, colour, size = objects[_pick(rng, len(objects))]
    same = [other for other, what, _, _ in objects if what == kind]
    return _board(rng, objects), {"kind": kind}, _place(same[0])


def _how_big(rng: Rng) -> Drawn:
    objects = _objects(rng, 2 + _pick(rng, 2))
    kind = objects[_pick(rng, len(objects))][1]
    first = next(thing for thing in objects if thing[1] == kind)
    return _board(rng, objects), {"kind": kind}, first[3]


def _extreme(rng: Rng) -> Drawn:
    """Two objects of different size: what kind is the one of the wanted size?"""
    objects = _objects(rng, 2)
    big = _pick(rng, 2)
    sizes = ("huge", "tiny") if rng.random() < 0.5 else (("huge", "medium") if rng.random() < 0.5 else ("medium", "tiny"))
    objects = [(c, k, n, sizes[i != big]) for i, (c, k, n, _) in enumerate(objects)]
    wanted = _pick(rng, 2)
    return _board(rng, objects), {"which": ("dominant", "slightest")[wanted]}, objects[big if not wanted else 1 - big][1]


def _share(rng: Rng) -> Drawn:
    """Two objects one above the other: what they have in common."""
    kind, colour = _pick(rng, 8), _pick(rng, 6)
    same_kind, same_colour = rng.random() < 0.5, rng.random() < 0.5
    other = kind if same_kind else (kind + 1 + _pick(rng, 7)) % 8
    paint = colour if same_colour else (colour + 1 + _pick(rng, 5)) % 6
    picture, radius = drawing.canvas(_paper(rng)), 5 + _pick(rng, 3)
    spots = (((8, 8), (24, 24)), ((8, 24), (24, 8)), ((16, 8), (16, 24)))[_pick(rng, 3)]
    for (x, y), what, name in zip(spots, (kind, other), (colour, paint), strict=True):
        mask = drawing.shape(KINDS[what], x + _pick(rng, 3) - 1, y + _pick(rng, 3) - 1, radius)
        drawing.paint(picture, mask, drawing.COLOURS[NAMES[name]])
    return picture, {}, ("nothing", "paint", "outline", "everything")[2 * same_kind + same_colour]


def _texture(rng: Rng) -> Drawn:
    step, ink, which = 3 + _pick(rng, 4), _ink(rng), _pick(rng, 6)
    picture, (y, x) = drawing.canvas(_paper(rng)), np.mgrid[0 : drawing.SIZE, 0 : drawing.SIZE] + _pick(rng, 4)
    half = step // 2 + 1
    masks = (
        (x < 0, x % (2 * step) < half, y % (2 * step) < half)
        + ((x + y) % (2 * step) < half, ((x // step) + (y // step)) % 2 == 0)
        + ((x % step == 0) & (y % step == 0),)
    )
    drawing.paint(picture, masks[which], ink)
    return picture, {}, TEXTURES[which]


def _backdrop(rng: Rng) -> Drawn:
    """One object on a strongly coloured ground."""
    ground, colour = rng.permutation(6)[:2]
    red, green, blue = drawing.COLOURS[NAMES[ground]]
    picture = drawing.canvas((red // 4 * 4 + 1, green, blue))
    mask = drawing.shape(KINDS[_pick(rng, 8)], 9 + _pick(rng, 14), 9 + _pick(rng, 14), 4 + _pick(rng, 5))
    drawing.paint(picture, mask, drawing.COLOURS[NAMES[colour]])
    return picture, {}, NAMES[ground]


def _walk(rng: Rng) -> Drawn:
    """A pen line over a grid of eight-pixel steps, told as compass directions from the blob at its start."""
    names = tuple(DIRECTIONS)
    x, y, told = _pick(rng, 5), _pick(rng, 5), list[str]()
    points = [(x, y)]
    while len(told) < 2 + len(points) % 2 and len(told) < 4:
        name = names[_pick(rng, 8)]
        dx, dy = DIRECTIONS[name]
        if 0 <= x + dx < 5 and 0 <= y + dy < 5 and (x + dx, y + dy) not in points:
            x, y = x + dx, y + dy
            points.append((x, y))
            told.append(name)
    picture, ink = drawing.canvas(_paper(rng)), _ink(rng)
    ends = [(2 + 7 * px, 2 + 7 * py) for px, py in points]
    drawing.paint(picture, drawing.polyline(ends, 2 + _pick(rng, 2)) | drawing.shape("circle", *ends[0], 3), ink)
    return picture, {}, " ".join(told)


def _slope(rng: Rng) -> Drawn:
    """A wandering line, told as its level (1 low .. 8 high) at five places."""
    levels = np.clip(np.cumsum(rng.integers(-3, 4, size=5)) + 1 + _pick(rng, 8), 1, 8)
    points = [(1 + 7 * i + (i > 3), 31 - 4 * int(level) + 2) for i, level in enumerate(levels)]
    picture = drawing.canvas(_paper(rng))
    drawing.paint(picture, drawing.polyline(points, 1 + _pick(rng, 3)), _ink(rng))
    return picture, {}, " ".join(str(level) for level in levels)


def _skyline(rng: Rng) -> Drawn:
    """Two, three, five or six towers, told as their storeys from left to right."""
    count = (2, 3, 5, 6)[_pick(rng, 4)]
    width, foot = drawing.SIZE // count, 27 + _pick(rng, 5)
    storeys = [1 + _pick(rng, 8) for _ in range(count)]
    picture, ink = drawing.canvas(_paper(rng)), _ink(rng)
    for i, height in enumerate(storeys):
        left = i * width + _pick(rng, 2)
        drawing.paint(picture, drawing.box(left, foot - 3 * height, left + width - 2 - _pick(rng, 2), foot), ink)
    return picture, {}, " ".join(map(str, storeys))


def _peak(rng: Rng) -> Drawn:
    """Lines lying on top of each other; which one reaches furthest."""
    names = ("upper", "central", "lower")
    lengths = 4 + rng.integers(0, 18, size=3)
    longest = _pick(rng, 3)
    lengths[longest] = max(np.delete(lengths, longest)) + 2 + _pick(rng, 4)
    picture, left, ink = drawing.canvas(_paper(rng)), 1 + _pick(rng, 4), _ink(rng)
    for i, length in enumerate(lengths):
        y = 3 + 10 * i + _pick(rng, 4)
        drawing.paint(picture, drawing.box(left, y, left + int(length), y + 1 + _pick(rng, 4)), ink)
    return picture, {}, names[longest]


def _beads(rng: Rng) -> Drawn:
    """Small marks in an 4 x 4 tray, told row by row."""
    tray = rng.random((4, 4)) < (0.1 + 0.5 * rng.random())
    picture, ink = drawing.canvas(_paper(rng)), _ink(rng)
    kind = ("circle", "square", "diamond", "cross")[_pick(rng, 4)]
    for row, column in np.argwhere(tray):
        x, y = 8 * int(column) + 3 + _pick(rng, 2), 8 * int(row) + 3 + _pick(rng, 2)
        drawing.paint(picture, drawing.shape(kind, x, y, 2 + _pick(rng, 2)), ink)
    return picture, {}, " ".join(str(int(number)) for number in tray.sum(1))


def _spelling(rng: Rng) -> Drawn:
    """Two or four printed characters, none of them A to D."""
    count = (2, 4)[_pick(rng, 2)]
    letters = [LETTERS[_pick(rng, len(LETTERS))] for _ in range(count)]
    picture, ink, top = drawing.canvas(_paper(rng)), _ink(rng), 1 + _pick(rng, 16)
    tall, wide = 1 + _pick(rng, 2), 1 + (count == 2 and rng.random() < 0.5)
    for i, letter in enumerate(letters):
        pattern = drawing.glyph(letter).repeat(tall, 0).repeat(wide, 1)
        drawing.paint(picture, drawing.stamp(pattern, i * (drawing.SIZE // count) + 1 + _pick(rng, 2), top), ink)
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
    return cells.repeat(4, 0).repeat(4, 1)


def _signature(rng: Rng) -> Drawn:
    """One symbol written askew and blurred."""
    symbol = SYMBOLS[_pick(rng, len(SYMBOLS))]
    return drawing.blend(_paper(rng), _ink(rng), _warped(rng, drawing.glyph(symbol))), {}, symbol


_MAKERS: Mapping[str, _Maker] = {
    "inventory": _Maker(("List everything drawn on the board.", "Take inventory of the board."), _inventory, 3.0),
    "kind": _Maker(("Which form occupies the {place} area?", "What sits at {place}?"), _kind),
    "where": _Maker(("Where does the {kind} lie?", "Locate the {kind}."), _where),
    "size": _Maker(("How big is the {kind}?", "Estimate the extent of the {kind}."), _how_big),
    "extreme": _Maker(("Which form seems {which}?", "Tell the form being {which}."), _extreme),
    "share": _Maker(("What do the pair have in common?", "State what the pair shares."), _share, 1.5),
    "texture": _Maker(("What texture covers the cloth?", "Describe the weave of the cloth."), _texture, 0.5),
    "backdrop": _Maker(("Which tint fills the backdrop?", "Tell the backdrop's tint."), _backdrop, 0.5),
    "walk": _Maker(("Follow the pen from its blob.", "Along which directions went the pen?"), _walk, 1.5),
    "slope": _Maker(("Sample the level of the wire.", "At what levels hangs the wire?"), _slope, 1.5),
    "skyline": _Maker(("Report the storeys of each tower.", "List storeys, tower by tower."), _skyline, 1.5),
    "peak": _Maker(("Which rod extends furthest?", "Find the rod that is longest."), _peak),
    "beads": _Maker(("Give the beads on every row.", "Row by row, note the beads."), _beads, 1.5),
    "spelling": _Maker(("Copy the type on the label.", "Transcribe the label's type."), _spelling, 2.0),
    "signature": _Maker(("Which symbol was scribbled?", "Decode the scribbled symbol."), _signature, 3.0),
}

PRETRAINING_TASKS: tuple[str, ...] = tuple(_MAKERS)


@lru_cache(maxsize=1)
def _shares() -> NDArray[np.float64]:
    weights = np.array([maker.weight for maker in _MAKERS.values()])
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def pretraining_examples(seed: int, count: int) -> list[Example]:
    """`count` examples of all tasks, mixed; an id's first part, up to the dash, names its task."""
    rng = generator(seed, "pretraining")
    chosen = rng.choice(len(PRETRAINING_TASKS), size=count, p=_shares())
    return [_example(rng, PRETRAINING_TASKS[int(which)], index) for index, which in enumerate(chosen)]


def pretraining_prompts(seed: int, per_task: int) -> dict[str, list[str]]:
    """Per task, `per_task` questions as they come in pre-training."""
    rng = generator(seed, "pretraining prompts")
    return {name: [_example(rng, name, index).question for index in range(per_task)] for name in PRETRAINING_TASKS}


def _example(rng: Rng, name: str, index: int) -> Example:
    maker = _MAKERS[name]
    picture, slots, answer = maker.draw(rng)
    question = maker.prompts[_pick(rng, len(maker.prompts))].format(**slots)
    return Example(f"{name}-{index}", question, answer, Pixels(picture))
