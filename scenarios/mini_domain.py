"""fcit-mini-domain's six tasks: two families of three domains each, told apart by their pictures alone.

The tasks of a family ask one question, word for word, and draw their answers from the same words; what the picture
looks like is what changes. Each of the three surfaces (pale paper, striped cloth, dark board) carries one task of
either family.

| task          | prompt                     | surface | picture                                    | answers | chance |
|---------------|----------------------------|---------|--------------------------------------------|---------|--------|
| digit_written | Which digit is shown?      | paper   | real handwriting, as fcit-mini's `names`   | 0 .. 9  | 0.10   |
| digit_printed | Which digit is shown?      | cloth   | a large glyph in a strong colour           | 0 .. 9  | 0.10   |
| digit_panel   | Which digit is shown?      | board   | seven glowing segments, leaning or upright | 0 .. 9  | 0.10   |
| count_dots    | How many marks stand here? | paper   | dark dots of one colour, as in `counting`  | 1 .. 6  | 0.17   |
| count_patches | How many marks stand here? | cloth   | shapes of many kinds and colours           | 1 .. 6  | 0.17   |
| count_strokes | How many marks stand here? | board   | glowing upright strokes side by side       | 1 .. 6  | 0.17   |

As in fcit-mini, the combination that makes up a picture decides its split, no (picture, question) comes twice in a
split, and papers, cloths and boards have channels divisible by four. A handwritten digit is in the split that it has
in `names`.
"""

from collections.abc import Mapping

from fedstrata.core.seeds import generator
from fedstrata.scenarios import mini_domain_pictures as domains
from fedstrata.scenarios import mini_pictures as pictures
from fedstrata.scenarios.mini import Maker, draw
from fedstrata.scenarios.stream import Example, Task

DIGIT = ("Which digit is shown?",)
COUNT = ("How many marks stand here?",)

_MAKERS: Mapping[str, Maker] = {
    "digit_written": Maker(DIGIT, lambda rng: (pictures.pick(rng, 1797),), pictures.draw_name, numbered=True),
    "count_dots": Maker(COUNT, pictures.cells, pictures.draw_dots),
    "digit_printed": Maker(DIGIT, domains.printed, domains.draw_printed),
    "count_patches": Maker(COUNT, domains.patches, domains.draw_patches),
    "digit_panel": Maker(DIGIT, domains.panel, domains.draw_panel),
    "count_strokes": Maker(COUNT, domains.strokes, domains.draw_strokes),
}

DOMAIN_TASKS: tuple[str, ...] = tuple(_MAKERS)
"""In stream order: the two families by turns."""

DOMAIN_ANSWERS: Mapping[str, frozenset[str]] = {
    name: frozenset("0123456789" if maker.prompts == DIGIT else "123456") for name, maker in _MAKERS.items()
}


def prompts(name: str) -> tuple[str, ...]:
    """A task's question: one wording, the same for its whole family."""
    return _MAKERS[name].prompts


def domain_task(name: str, seed: int, train: int, val: int, test: int) -> Task:
    """One of `DOMAIN_TASKS` with that many examples per split: pictures [32, 32, 3], scored by exact match."""
    return Task(
        name,
        train=_drawn(name, "train", seed, train),
        val=_drawn(name, "val", seed, val),
        test=_drawn(name, "test", seed, test),
    )


def _drawn(name: str, split: str, seed: int, count: int) -> tuple[Example, ...]:
    """Each answer comes equally often, give or take one."""
    rng = generator(seed, "mini-domain", name, split)
    return draw(name, _MAKERS[name], split, rng, count, -(-count // len(DOMAIN_ANSWERS[name])))
