"""fcit-mini's eight tasks: miniature image instructions in the spirit of FCIT's eight, drawn from a seed.

Answer words are shared in pairs, so that forgetting a task is more than forgetting its answer format. "Chance" is the
larger of 1 / #answers and the share of the most frequent answer.

| task       | FCIT counterpart | prompt (one of its wordings)                    | answers          | skill       | chance |
|------------|------------------|-------------------------------------------------|------------------|-------------|--------|
| names      | ImageNet-R       | Which digit did somebody write by hand?         | 0 .. 9           | handwriting | 0.10   |
| charts     | ArxivQA          | Which labelled bar of the chart is tallest?     | A, B, C, D       | heights     | 0.25   |
| icons      | IconQA           | Are both icons identical?                       | yes, no          | sameness    | 0.50   |
| counting   | CLEVR-Math       | How many dots can you count?                    | 1 .. 6           | number      | 0.17   |
| reading    | OCR-VQA          | What letter comes first in the printed word?    | A, B, C, D       | glyphs      | 0.25   |
| captions   | Flickr30k        | Write a short caption describing this photo.    | a red circle ... | scenes      | 0.00   |
| figures    | FigureQA         | Does the plotted curve rise towards the right?  | yes, no          | lines       | 0.50   |
| attributes | VizWiz           | What colour has the larger object?              | six colour words | binding     | 0.17   |

The *combination* that makes up a picture (a digit's index, a chart's heights, ...) decides its split, so train, val and
test are disjoint in content; within a split no (picture, question) comes twice. Papers (background colours) have
channels divisible by four, those of the pre-training never do: no picture of one occurs in the other.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedstrata.core.seeds import generator
from fedstrata.scenarios import drawing
from fedstrata.scenarios.stream import Example, Pixels, Task

Combination = tuple[int | str, ...]
Rng = np.random.Generator

PAPERS: tuple[drawing.Colour, ...] = ((248, 248, 240), (228, 236, 248), (240, 228, 220), (220, 240, 224))
INKS: tuple[drawing.Colour, ...] = ((20, 20, 30), (30, 40, 120), (110, 30, 30), (20, 90, 50))
NAMES = tuple(drawing.COLOURS)
KINDS = ("circle", "square", "triangle", "diamond", "ring")
ICONS = tuple(drawing.SHAPES)


@dataclass(frozen=True)
class _Maker:
    """`combine(rng)` draws what decides the split; `render(rng, combination)` gives (picture, question slot, answer)."""

    prompts: tuple[str, ...]
    combine: Callable[[Rng], Combination]
    render: Callable[[Rng, Combination], tuple[drawing.Array, str, str]]


def _pick(rng: Rng, count: int) -> int:
    return int(rng.integers(count))


def _paper(rng: Rng) -> drawing.Colour:
    return PAPERS[_pick(rng, len(PAPERS))]


def _ink(rng: Rng) -> drawing.Colour:
    return INKS[_pick(rng, len(INKS))]


@lru_cache(maxsize=1)
def _digits() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """scikit-learn's 1797 real handwritten digits: images [1797, 8, 8] of 0..16, and their names [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.int64), data.target.astype(np.int64)


def _name(rng: Rng, combination: Combination) -> tuple[drawing.Array, str, str]:
    images, names = _digits()
    index = int(combination[0])
    amount = np.roll(images[index].repeat(4, 0).repeat(4, 1), _pick(rng, 3) - 1, axis=1)
    return drawing.blend(_paper(rng), _ink(rng), amount), "", str(names[index])


def _chart(rng: Rng, combination: Combination) -> tuple[drawing.Array, str, str]:
    picture, ink = drawing.canvas(_paper(rng)), _ink(rng)
    heights = [int(height) for height in combination]
    for bar, height in enumerate(heights):
        drawing.paint(picture, drawing.box(8 * bar + 1, 24 - height, 8 * bar + 6, 24), ink)
        drawing.paint(picture, drawing.stamp(drawing.glyph("ABCD"[bar]), 8 * bar + 1, 26), (0, 0, 0))
    return picture, "", "ABCD"[heights.index(max(heights))]


def _heights(rng: Rng) -> Combination:
    heights = rng.integers(3, 18, size=4)
    tallest = _pick(rng, 4)
    heights[tallest] = max(np.delete(heights, tallest)) + 3 + _pick(rng, 4)
    return tuple(int(height) for height in heights)


def _icon_pair(rng: Rng) -> Combination:
    left, step = _pick(rng, len(ICONS)), 1 + _pick(rng, len(ICONS) - 1)
    right = left if rng.random() < 0.5 else (left + step) % len(ICONS)
    return ICONS[left], ICONS[right], _pick(rng, len(NAMES)), 5 + _pick(rng, 3)


def _icon(rng: Rng, combination: Combination) -> tuple[drawing.Array, str, str]:
    left, right, ink, radius = combination
    picture, middle = drawing.canvas(_paper(rng)), 13 + _pick(rng, 6)
    for x, kind in ((8, left), (24, right)):
        mask = drawing.shape(str(kind), x, middle, int(radius))
        drawing.paint(picture, mask, drawing.COLOURS[NAMES[int(ink)]])
    return picture, "", "yes" if left == right else "no"


def _cells(rng: Rng) -> Combination:
    count = 1 + _pick(rng, 6)
    return tuple(sorted(int(cell) for cell in rng.permutation(16)[:count]))


def _count(rng: Rng, combination: Combination) -> tuple[drawing.Array, str, str]:
    picture, ink = drawing.canvas(_paper(rng)), _ink(rng)
    for cell in combination:
        y, x = divmod(int(cell), 4)
        mask = drawing.shape("circle", 8 * x + 3 + _pick(rng, 2), 8 * y + 3 + _pick(rng, 2), 2 + _pick(rng, 2))
        drawing.paint(picture, mask, ink)
    return picture, "", str(len(combination))


def _word(rng: Rng) -> Combination:
    return *("ABCD"[_pick(rng, 4)] for _ in range(3)), _pick(rng, len(INKS))


def _read(rng: Rng, combination: Combination) -> tuple[drawing.Array, str, str]:
    *letters, ink = combination
    picture, top = drawing.canvas(_paper(rng)), 6 + _pick(rng, 8)
    for place, letter in enumerate(letters):
        pattern = drawing.glyph(str(letter)).repeat(2, 0)
        drawing.paint(picture, drawing.stamp(pattern, 2 + 10 * place + _pick(rng, 3), top), INKS[int(ink)])
    last = _pick(rng, 2)
    return picture, ("first", "last")[last], str(letters[-last])


def _scene(rng: Rng) -> Combination:
    first, second = _pick(rng, len(NAMES)), _pick(rng, len(NAMES))
    relation = ("above", "left of")[_pick(rng, 2)]
    return NAMES[first], KINDS[_pick(rng, len(KINDS))], relation, NAMES[second], KINDS[_pick(rng, len(KINDS))]


def _caption(rng: Rng, combination: Combination) -> tuple[drawing.Array, str, str]:
    picture = drawing.canvas(_paper(rng))
    colour, kind, relation, other, second = map(str, combination)
    for place, (name, what) in enumerate(((colour, kind), (other, second))):
        along, across = 8 + 16 * place, 13 + _pick(rng, 6)
        x, y = (across, along) if relation == "above" else (along, across)
        drawing.paint(picture, drawing.shape(what, x, y, 5 + _pick(rng, 3)), drawing.COLOURS[name])
    return picture, "", f"a {colour} {kind} {relation} a {other} {second}"


def _bends(rng: Rng) -> Combination:
    low, high = 20 + _pick(rng, 9), 3 + _pick(rng, 9)
    middle = high + _pick(rng, low - high + 1)
    return (low, middle, high) if rng.random() < 0.5 else (high, middle, low)


def _figure(rng: Rng, combination: Combination) -> tuple[drawing.Array, str, str]:
    picture, (left, middle, right) = drawing.canvas(_paper(rng)), map(int, combination)
    drawing.paint(picture, drawing.box(0, 31, 31, 31) | drawing.box(0, 0, 0, 31), (90, 90, 90))
    points = [(2, left), (11 + _pick(rng, 11), middle), (29, right)]
    drawing.paint(picture, drawing.polyline(points, 2 + _pick(rng, 2)), drawing.COLOURS[NAMES[_pick(rng, 6)]])
    return picture, "", "yes" if right < left else "no"


def _objects(rng: Rng) -> Combination:
    first, step = _pick(rng, len(NAMES)), 1 + _pick(rng, len(NAMES) - 1)
    kinds = KINDS[_pick(rng, len(KINDS))], KINDS[_pick(rng, len(KINDS))]
    return NAMES[first], kinds[0], NAMES[(first + step) % len(NAMES)], kinds[1], _pick(rng, 2)


def _attribute(rng: Rng, combination: Combination) -> tuple[drawing.Array, str, str]:
    """The first object is the larger one; the last entry says whether it lies left."""
    picture, (big, kind, small, second, side) = drawing.canvas(_paper(rng)), combination
    for name, what, x, radius in ((big, kind, 9, 8), (small, second, 25, 4)):
        where = x if side else 31 - x
        mask = drawing.shape(str(what), where, 10 + _pick(rng, 12), radius)
        drawing.paint(picture, mask, drawing.COLOURS[str(name)])
    wanted = _pick(rng, 2)
    return picture, ("larger", "smaller")[wanted], str((big, small)[wanted])


_MAKERS: Mapping[str, _Maker] = {
    "names": _Maker(
        (
            "Which digit did somebody write by hand?",
            "Identify the handwritten digit.",
            "Read this scan: which digit was handwritten?",
            "Which digit is this handwritten sign?",
        ),
        lambda rng: (_pick(rng, 1797),),
        _name,
    ),
    "charts": _Maker(
        (
            "Which labelled bar of the chart is tallest?",
            "Pick the tallest bar in the chart.",
            "Of the bars in the bar chart, which bar is tallest?",
            "Give the label of the tallest chart bar.",
        ),
        _heights,
        _chart,
    ),
    "icons": _Maker(
        (
            "Are both icons identical?",
            "Do both icons match one another?",
            "Are these icons identical twins?",
            "Decide whether both icons match.",
        ),
        _icon_pair,
        _icon,
    ),
    "counting": _Maker(
        (
            "How many dots can you count?",
            "Count the dots: how many?",
            "How many dots are there?",
            "Tell me how many dots you count.",
        ),
        _cells,
        _count,
    ),
    "reading": _Maker(
        (
            "What letter comes {} in the printed word?",
            "Spell the {} letter of the printed word.",
            "The printed word has which {} letter?",
        ),
        _word,
        _read,
    ),
    "captions": _Maker(
        (
            "Write a short caption describing this photo.",
            "Caption this photo with a short sentence.",
            "Compose a short sentence as photo caption.",
            "Write one sentence describing this photo.",
        ),
        _scene,
        _caption,
    ),
    "figures": _Maker(
        (
            "Does the plotted curve rise towards the right?",
            "Is the plotted curve rising?",
            "Going right, does the curve in the plot rise?",
            "Judge if the plotted curve goes upwards.",
        ),
        _bends,
        _figure,
    ),
    "attributes": _Maker(
        (
            "What colour has the {} object?",
            "Name the colour of the {} object.",
            "The {} object has what colour?",
        ),
        _objects,
        _attribute,
    ),
}

MINI_TASKS: tuple[str, ...] = tuple(_MAKERS)
"""In stream order; the two tasks of an answer-sharing pair are never neighbours."""

ANSWERS: Mapping[str, frozenset[str]] = {
    "names": frozenset("0123456789"),
    "charts": frozenset("ABCD"),
    "icons": frozenset(("yes", "no")),
    "counting": frozenset("123456"),
    "reading": frozenset("ABCD"),
    "captions": frozenset(
        f"a {colour} {kind} {relation} a {other} {second}"
        for colour in NAMES
        for kind in KINDS
        for relation in ("above", "left of")
        for other in NAMES
        for second in KINDS
    ),
    "figures": frozenset(("yes", "no")),
    "attributes": frozenset(NAMES),
}

CHANCE: Mapping[str, float] = {name: round(1 / len(answers), 3) for name, answers in ANSWERS.items()}
"""Accuracy of the best guess without a picture, 0..1; the draws give every answer the same probability."""


def prompts(name: str) -> tuple[str, ...]:
    """A task's question wordings; `{}` is the place of a slot word."""
    return _MAKERS[name].prompts


def _split_of(name: str, combination: Combination) -> str:
    """Three fifths of all combinations are for training, one for validation, one for test."""
    if name == "names":
        part = int(combination[0]) % 5
    else:
        part = hashlib.sha256(repr((name, combination)).encode()).digest()[0] % 5
    return ("train", "train", "train", "val", "test")[part]


def _draw(name: str, split: str, seed: int, count: int) -> tuple[Example, ...]:
    """`count` different examples of one split, a pure function of the arguments."""
    maker, rng = _MAKERS[name], generator(seed, "mini", name, split)
    seen: set[tuple[bytes, str]] = set()
    given: Counter[str] = Counter()
    most = -(-count // min(len(ANSWERS[name]), 10)) if name != "captions" else count
    examples: list[Example] = []
    while len(examples) < count:
        combination = maker.combine(rng)
        if _split_of(name, combination) != split:
            continue
        picture, slot, answer = maker.render(rng, combination)
        question = maker.prompts[_pick(rng, len(maker.prompts))].format(slot)
        if given[answer] < most and (key := (picture.tobytes(), question)) not in seen:
            seen.add(key)
            given[answer] += 1
            examples.append(Example(f"{name}-{split}-{len(examples)}", question, answer, Pixels(picture)))
    return tuple(examples)


def mini_task(name: str, seed: int, train: int, val: int, test: int) -> Task:
    """One of `MINI_TASKS` with that many examples per split: pictures [32, 32, 3], scored by exact match."""
    return Task(
        name,
        train=_draw(name, "train", seed, train),
        val=_draw(name, "val", seed, val),
        test=_draw(name, "test", seed, test),
    )
