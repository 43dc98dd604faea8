"""fcit-mini-domain's pictures beside those it shares with fcit-mini: digits and marks on striped cloth and dark boards.

A function without `draw` in its name draws the combination that decides an example's split, its `draw_` turns that into
(picture [32, 32, 3], no slot word, answer).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fedstrata.scenarios import drawing
from fedstrata.scenarios.mini_pictures import NAMES, Combination, Drawn, Rng, pick

CLOTHS: tuple[tuple[drawing.Colour, drawing.Colour], ...] = (
    ((196, 180, 148), (224, 208, 176)),
    ((156, 184, 196), (184, 212, 224)),
    ((172, 196, 156), (200, 224, 184)),
    ((204, 168, 184), (232, 196, 212)),
)
BOARDS: tuple[drawing.Colour, ...] = ((20, 24, 36), (40, 24, 28), (16, 40, 32), (32, 32, 32))
DYES: tuple[drawing.Colour, ...] = ((180, 20, 40), (20, 70, 180), (110, 20, 140), (0, 100, 60))
LAMPS: tuple[drawing.Colour, ...] = ((250, 220, 90), (120, 240, 140), (250, 140, 110), (160, 220, 250))
FORMS = ("circle", "square", "triangle", "diamond")

_LIT: Mapping[str, str] = {
    "0": "abcdef",
    "1": "bc",
    "2": "abdeg",
    "3": "abcdg",
    "4": "bcfg",
    "5": "acdfg",
    "6": "acdefg",
    "7": "abc",
    "8": "abcdefg",
    "9": "abcdfg",
}
"""Digit → its segments on a seven-segment panel: a on top, then clockwise to f, g in the middle."""


def _choice(rng: Rng, colours: Sequence[drawing.Colour]) -> drawing.Colour:
    return colours[pick(rng, len(colours))]


def _cloth(rng: Rng) -> drawing.Array:
    """Upright, lying or slanted stripes in two shades of one colour."""
    ground, stripe = CLOTHS[pick(rng, len(CLOTHS))]
    y, x = np.mgrid[0 : drawing.SIZE, 0 : drawing.SIZE]
    along, width = (x, y, x + y)[pick(rng, 3)], 2 + pick(rng, 2)
    picture = drawing.canvas(ground)
    drawing.paint(picture, (along + pick(rng, 2 * width)) % (2 * width) < width, stripe)
    return picture


def printed(rng: Rng) -> Combination:
    """A digit, its dye, and its left and top."""
    return pick(rng, 10), pick(rng, len(DYES)), 4 + pick(rng, 8), 1 + pick(rng, 5)


def draw_printed(rng: Rng, combination: Combination) -> Drawn:
    digit, dye, left, top = map(int, combination)
    picture = _cloth(rng)
    drawing.paint(picture, drawing.stamp(drawing.glyph(str(digit)), left, top, 3), DYES[dye])
    return picture, "", str(digit)


def panel(rng: Rng) -> Combination:
    """A digit, its left and top, the width and height of a segment, and how far its top leans to the right."""
    return pick(rng, 10), 5 + pick(rng, 4), 3 + pick(rng, 4), 10 + pick(rng, 4), 10 + pick(rng, 2), pick(rng, 3)


def draw_panel(rng: Rng, combination: Combination) -> Drawn:
    digit, left, top, width, height, lean = map(int, combination)
    picture, lamp, thick = drawing.canvas(_choice(rng, BOARDS)), _choice(rng, LAMPS), 2 + pick(rng, 3)
    lines = [(left + lean * (2 - line), top + line * height) for line in range(3)]
    (a, b), (f, c), (e, d) = ((start, (start[0] + width, start[1])) for start in lines)
    segments = {"a": (a, b), "b": (b, c), "c": (c, d), "d": (e, d), "e": (f, e), "f": (a, f), "g": (f, c)}
    for name in _LIT[str(digit)]:
        drawing.paint(picture, drawing.segment(*segments[name], thick), lamp)
    return picture, "", str(digit)


def patches(rng: Rng) -> Combination:
    """One to six cells of nine, each followed by a form and a colour."""
    cells = sorted(int(cell) for cell in rng.permutation(9)[: 1 + pick(rng, 6)])
    return tuple(part for cell in cells for part in (cell, FORMS[pick(rng, len(FORMS))], NAMES[pick(rng, len(NAMES))]))


def draw_patches(rng: Rng, combination: Combination) -> Drawn:
    picture = _cloth(rng)
    for cell, form, name in zip(combination[::3], combination[1::3], combination[2::3], strict=True):
        y, x = divmod(int(cell), 3)
        mask = drawing.shape(str(form), 10 * x + 5 + pick(rng, 2), 10 * y + 5 + pick(rng, 2), 4)
        drawing.paint(picture, mask, drawing.COLOURS[str(name)])
    return picture, "", str(len(combination) // 3)


def strokes(rng: Rng) -> Combination:
    """One to six places of eight, each followed by a stroke's top."""
    places = sorted(int(place) for place in rng.permutation(8)[: 1 + pick(rng, 6)])
    return tuple(part for place in places for part in (place, 2 + pick(rng, 8)))


def draw_strokes(rng: Rng, combination: Combination) -> Drawn:
    picture, lamp = drawing.canvas(_choice(rng, BOARDS)), _choice(rng, LAMPS)
    for place, top in zip(combination[::2], combination[1::2], strict=True):
        left = 4 * int(place) + pick(rng, 2)
        drawing.paint(picture, drawing.box(left, int(top), left + 1, 22 + pick(rng, 8)), lamp)
    return picture, "", str(len(combination) // 2)
