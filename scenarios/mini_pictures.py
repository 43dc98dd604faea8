"""fcit-mini's pictures. `heights` and its like draw the combination that decides an example's split; `draw_chart` and
its like turn a combination into (picture [32, 32, 3], the question's slot word, answer).
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedstrata.scenarios import drawing

Combination = tuple[int | str, ...]
Rng = np.random.Generator
Drawn = tuple[drawing.Array, str, str]

PAPERS: tuple[drawing.Colour, ...] = ((248, 248, 240), (228, 236, 248), (240, 228, 220), (220, 240, 224))
INKS: tuple[drawing.Colour, ...] = ((20, 20, 30), (30, 40, 120), (110, 30, 30), (20, 90, 50))
NAMES = tuple(drawing.COLOURS)
KINDS = ("circle", "square", "triangle", "diamond", "ring")


def pick(rng: Rng, count: int) -> int:
    return int(rng.random() * count)  # ten times faster than rng.integers


def _paper(rng: Rng) -> drawing.Colour:
    return PAPERS[pick(rng, len(PAPERS))]


def _ink(rng: Rng) -> drawing.Colour:
    return INKS[pick(rng, len(INKS))]


@lru_cache(maxsize=1)
def _digits() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """scikit-learn's 1797 real handwritten digits: images [1797, 8, 8] of 0..16, and their names [1797]."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # slow to import

    data = load_digits()
    return data.images.astype(np.int64), data.target.astype(np.int64)


def draw_name(rng: Rng, combination: Combination) -> Drawn:
    images, names = _digits()
    index = int(combination[0])
    amount = np.roll(images[index].repeat(4, 0).repeat(4, 1), pick(rng, 3) - 1, axis=1)
    return drawing.blend(_paper(rng), _ink(rng), amount), "", str(names[index])


def draw_chart(rng: Rng, combination: Combination) -> Drawn:
    picture, ink = drawing.canvas(_paper(rng)), _ink(rng)
    heights = [int(height) for height in combination]
    for bar, height in enumerate(heights):
        drawing.paint(picture, drawing.box(8 * bar + 1, 24 - height, 8 * bar + 6, 24), ink)
        drawing.paint(picture, drawing.stamp(drawing.glyph("ABCD"[bar]), 8 * bar + 1, 26), (0, 0, 0))
    return picture, "", "ABCD"[heights.index(max(heights))]


def heights(rng: Rng) -> Combination:
    heights = [3 + pick(rng, 15) for _ in range(3)]
    heights.insert(pick(rng, 4), min(max(heights) + 3 + pick(rng, 4), 22))
    return tuple(heights)


def icon_pair(rng: Rng) -> Combination:
    """Two icons, each (kind, ink), and their radius; unlike ones differ in kind, ink or both."""
    kind, ink = pick(rng, len(KINDS)), pick(rng, len(NAMES))
    unlike = 0 if rng.random() < 0.5 else 1 + pick(rng, 3)
    other = (kind + 1 + pick(rng, len(KINDS) - 1)) % len(KINDS) if unlike != 1 else kind
    second = (ink + 1 + pick(rng, len(NAMES) - 1)) % len(NAMES) if unlike != 2 else ink
    pair = (other, second) if unlike else (kind, ink)
    return KINDS[kind], NAMES[ink], KINDS[pair[0]], NAMES[pair[1]], 6 + pick(rng, 2)


def draw_icons(rng: Rng, combination: Combination) -> Drawn:
    kind, ink, other, second, radius = combination
    picture = drawing.canvas(_paper(rng))
    for x, what, name in ((8, kind, ink), (24, other, second)):
        mask = drawing.shape(str(what), x, 15 + pick(rng, 3), int(radius))
        drawing.paint(picture, mask, drawing.COLOURS[str(name)])
    return picture, "", "yes" if (kind, ink) == (other, second) else "no"


def cells(rng: Rng) -> Combination:
    count = 1 + pick(rng, 6)
    return tuple(sorted(int(cell) for cell in rng.permutation(16)[:count]))


def draw_dots(rng: Rng, combination: Combination) -> Drawn:
    picture, ink = drawing.canvas(_paper(rng)), _ink(rng)
    for cell in combination:
        y, x = divmod(int(cell), 4)
        mask = drawing.shape("circle", 8 * x + 3 + pick(rng, 2), 8 * y + 3 + pick(rng, 2), 2 + pick(rng, 2))
        drawing.paint(picture, mask, ink)
    return picture, "", str(len(combination))


def word(rng: Rng) -> Combination:
    """Two letters, an ink and how far down they stand."""
    return "ABCD"[pick(rng, 4)], "ABCD"[pick(rng, 4)], pick(rng, len(INKS)), 2 + 8 * pick(rng, 3)


def draw_word(rng: Rng, combination: Combination) -> Drawn:
    *letters, ink, top = combination
    picture = drawing.canvas(_paper(rng))
    for place, letter in enumerate(letters):
        pattern = drawing.glyph(str(letter))
        left = 16 * place + 2 + pick(rng, 2)
        drawing.paint(picture, drawing.stamp(pattern, left, int(top), 2), INKS[int(ink)])
    last = pick(rng, 2)
    return picture, ("first", "last")[last], str(letters[-last])


def scene(rng: Rng) -> Combination:
    first, second = pick(rng, len(NAMES)), pick(rng, len(NAMES))
    relation = ("above", "left of")[pick(rng, 2)]
    return NAMES[first], KINDS[pick(rng, len(KINDS))], relation, NAMES[second], KINDS[pick(rng, len(KINDS))]


def draw_scene(rng: Rng, combination: Combination) -> Drawn:
    picture = drawing.canvas(_paper(rng))
    colour, kind, relation, other, second = map(str, combination)
    for place, (name, what) in enumerate(((colour, kind), (other, second))):
        along, across = 8 + 16 * place, 13 + pick(rng, 6)
        x, y = (across, along) if relation == "above" else (along, across)
        drawing.paint(picture, drawing.shape(what, x, y, 5 + pick(rng, 3)), drawing.COLOURS[name])
    return picture, "", caption(*map(str, combination))


def caption(colour: str, kind: str, relation: str, other: str, second: str) -> str:
    """The one right caption of a scene.

    >>> caption("red", "circle", "above", "orange", "square")
    'a red circle above an orange square'
    """
    first, last = ("an" if name == "orange" else "a" for name in (colour, other))
    return f"{first} {colour} {kind} {relation} {last} {other} {second}"


def bends(rng: Rng) -> Combination:
    low, high = 20 + pick(rng, 9), 3 + pick(rng, 9)
    middle = high + pick(rng, low - high + 1)
    return (low, middle, high) if rng.random() < 0.5 else (high, middle, low)


def draw_curve(rng: Rng, combination: Combination) -> Drawn:
    picture, (left, middle, right) = drawing.canvas(_paper(rng)), map(int, combination)
    drawing.paint(picture, drawing.box(0, 31, 31, 31) | drawing.box(0, 0, 0, 31), (90, 90, 90))
    points = [(2, left), (11 + pick(rng, 11), middle), (29, right)]
    drawing.paint(picture, drawing.polyline(points, 2 + pick(rng, 2)), drawing.COLOURS[NAMES[pick(rng, 6)]])
    return picture, "", "yes" if right < left else "no"


def objects(rng: Rng) -> Combination:
    first, step = pick(rng, len(NAMES)), 1 + pick(rng, len(NAMES) - 1)
    kinds = KINDS[pick(rng, len(KINDS))], KINDS[pick(rng, len(KINDS))]
    return NAMES[first], kinds[0], NAMES[(first + step) % len(NAMES)], kinds[1], pick(rng, 2)


def draw_objects(rng: Rng, combination: Combination) -> Drawn:
    """The first object is the larger one; the last entry says whether it lies left."""
    picture, (big, kind, small, second, side) = drawing.canvas(_paper(rng)), combination
    for name, what, x, radius in ((big, kind, 9, 8), (small, second, 25, 4)):
        where = x if side else 31 - x
        mask = drawing.shape(str(what), where, 10 + pick(rng, 12), radius)
        drawing.paint(picture, mask, drawing.COLOURS[str(name)])
    wanted = pick(rng, 2)
    return picture, ("larger", "smaller")[wanted], str((big, small)[wanted])
