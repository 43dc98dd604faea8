"""fcit-mini's eight tasks: miniature image instructions in the spirit of FCIT's eight, drawn from a seed.

Answer words are shared in pairs, so that forgetting a task is more than forgetting its answer format. "Chance" is the
larger of 1 / #answers and the share of the most frequent answer.

| task       | in FCIT     | prompt (one of its wordings)                    | answers          | skill       | chance |
|------------|-------------|-------------------------------------------------|------------------|-------------|--------|
| names      | ImageNet-R  | Which digit did somebody write by hand?         | 0 .. 9           | handwriting | 0.10   |
| charts     | ArxivQA     | Of all bars charted, pick the tallest.          | A, B, C, D       | heights     | 0.25   |
| icons      | IconQA      | Are both icons identical?                       | yes, no          | sameness    | 0.50   |
| counting   | CLEVR-Math  | How many dots can you count?                    | 1 .. 6           | number      | 0.17   |
| reading    | OCR-VQA     | Spell out the first printed letter.             | A, B, C, D       | glyphs      | 0.25   |
| captions   | Flickr30k   | Write a short caption describing this photo.    | a red circle ... | scenes      | 0.00   |
| figures    | FigureQA    | Does the plotted curve rise from left to right? | yes, no          | lines       | 0.50   |
| attributes | super-CLEVR | What colour has the larger object?              | six colour words | binding     | 0.17   |

The *combination* that makes up a picture (a digit's index, a chart's heights, ...) decides its split, so train, val and
test are disjoint in content; within a split no (picture, question) comes twice. Papers (background colours) have
channels divisible by four, those of the pre-training never do: no picture of one occurs in the other.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedstrata.core.errors import BadInput
from fedstrata.core.seeds import generator
from fedstrata.scenarios import mini_pictures as pictures
from fedstrata.scenarios.mini_pictures import KINDS, NAMES, Combination, Drawn, Rng
from fedstrata.scenarios.stream import Example, Pixels, Task

PATIENCE = 20_000
"""Fruitless tries in a row after which a split counts as used up."""


@dataclass(frozen=True)
class Maker:
    """`combine` draws what decides the split; `render` gives (picture, question slot, answer).

    `numbered`: the combination is a record's number, and that alone decides the split, whatever the task's name.
    """

    prompts: tuple[str, ...]
    combine: Callable[[Rng], Combination]
    render: Callable[[Rng, Combination], Drawn]
    numbered: bool = False


_MAKERS: Mapping[str, Maker] = {
    "names": Maker(
        (
            "Which digit did somebody write by hand?",
            "Which digit did a person write by hand?",
            "Which digit, by hand, did somebody write here?",
        ),
        lambda rng: (pictures.pick(rng, 1797),),
        pictures.draw_name,
        numbered=True,
    ),
    "charts": Maker(
        (
            "Of all bars charted, pick the tallest.",
            "From all bars charted, pick the tallest.",
            "Of all bars charted here, pick the tallest one.",
        ),
        pictures.heights,
        pictures.draw_chart,
    ),
    "icons": Maker(
        (
            "Are both icons identical?",
            "Are both these icons identical?",
            "Are both icons identical twins?",
        ),
        pictures.icon_pair,
        pictures.draw_icons,
    ),
    "counting": Maker(
        (
            "How many dots can you count?",
            "How many dots do you count?",
            "How many dots can you count here?",
        ),
        pictures.cells,
        pictures.draw_dots,
    ),
    "reading": Maker(
        (
            "Spell out the {} printed letter.",
            "Spell out the {} letter, printed here.",
            "Please spell out the {} printed letter.",
        ),
        pictures.word,
        pictures.draw_word,
    ),
    "captions": Maker(
        (
            "Write a short caption describing this photo.",
            "Compose a short caption describing this photo.",
            "Write a brief caption describing this photo.",
        ),
        pictures.scene,
        pictures.draw_scene,
    ),
    "figures": Maker(
        (
            "Does the plotted curve rise towards its right end?",
            "Does the plotted curve rise from left to right?",
            "Does this plotted curve rise towards the right?",
        ),
        pictures.bends,
        pictures.draw_curve,
    ),
    "attributes": Maker(
        (
            "What colour has the {} object?",
            "What colour does the {} object have?",
            "What colour has that {} object?",
        ),
        pictures.objects,
        pictures.draw_objects,
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
        pictures.caption(colour, kind, relation, other, second)
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


def _split_of(name: str, maker: Maker, combination: Combination) -> str:
    """Three fifths of all combinations are for training, one for validation, one for test."""
    if maker.numbered:
        part = int(combination[0]) % 5
    else:
        part = hashlib.sha256(repr((name, combination)).encode()).digest()[0] % 5
    return ("train", "train", "train", "val", "test")[part]


def draw(name: str, maker: Maker, split: str, rng: Rng, count: int, most: int) -> tuple[Example, ...]:
    """`count` different examples of one split, at most `most` with the same answer; all chance comes from `rng`.

    Raises:
        BadInput: the split does not hold that many.
    """
    seen: set[tuple[bytes, str]] = set()
    given: Counter[str] = Counter()
    examples: list[Example] = []
    tries = 0
    while len(examples) < count:
        tries += 1
        if tries > PATIENCE:
            raise BadInput(f"{name}: {split} must be fewer, no new example came after {len(examples)}, got {count}")
        combination = maker.combine(rng)
        if _split_of(name, maker, combination) != split:
            continue
        picture, slot, answer = maker.render(rng, combination)
        question = maker.prompts[pictures.pick(rng, len(maker.prompts))].format(slot)
        if given[answer] < most and (key := (picture.tobytes(), question)) not in seen:
            seen.add(key)
            given[answer] += 1
            tries = 0
            examples.append(Example(f"{name}-{split}-{len(examples)}", question, answer, Pixels(picture)))
    return tuple(examples)


def _drawn(name: str, split: str, seed: int, count: int) -> tuple[Example, ...]:
    most = -(-count // min(len(ANSWERS[name]), 10)) if name != "captions" else count
    return draw(name, _MAKERS[name], split, generator(seed, "mini", name, split), count, most)


def mini_task(name: str, seed: int, train: int, val: int, test: int) -> Task:
    """One of `MINI_TASKS` with that many examples per split: pictures [32, 32, 3], scored by exact match."""
    return Task(
        name,
        train=_drawn(name, "train", seed, train),
        val=_drawn(name, "val", seed, val),
        test=_drawn(name, "test", seed, test),
    )
