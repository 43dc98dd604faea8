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
from fedstrata.scenarios import pretraining_pictures as pictures
from fedstrata.scenarios.pretraining_pictures import Drawn, Rng
from fedstrata.scenarios.stream import Example, Pixels, Task


@dataclass(frozen=True)
class _Maker:
    """`draw(rng)` gives (picture, the prompt's slot words, answer); `weight` is its share of the examples."""

    prompts: tuple[str, ...]
    draw: Callable[[Rng], Drawn]
    weight: float = 1.0


_MAKERS: Mapping[str, _Maker] = {
    "inventory": _Maker(
        ("List everything drawn on the board.", "List everything the board shows."), pictures.inventory, 3.0
    ),
    "kind": _Maker(("What form occupies the {place}?", "What form occupies the area {place}?"), pictures.kind),
    "where": _Maker(("Where does the {kind} lie?", "Where abouts does the {kind} lie?"), pictures.where),
    "size": _Maker(("How big is the {kind}?", "How big is that {kind}?"), pictures.size),
    "extreme": _Maker(("Tell which form seems {which}.", "Tell me which form seems {which}."), pictures.extreme, 0.5),
    "share": _Maker(("In common this pair has what?", "What has this pair in common?"), pictures.share, 3.0),
    "texture": _Maker(("Feel the cloth for its texture.", "Feel the cloth, give its texture."), pictures.texture, 0.3),
    "backdrop": _Maker(("Which tint fills the backdrop?", "Which tint fills up the backdrop?"), pictures.backdrop, 0.3),
    "walk": _Maker(("Follow the pen from its blob.", "Follow the pen, starting at its blob."), pictures.walk, 1.0),
    "slope": _Maker(("Sample levels along the wire.", "Sample five levels along the wire."), pictures.slope, 0.7),
    "skyline": _Maker(("Report storeys for each tower.", "Report storeys, tower for tower."), pictures.skyline, 1.5),
    "peak": _Maker(("Seek the rod that extends furthest.", "Seek whichever rod extends furthest."), pictures.peak, 0.7),
    "beads": _Maker(("Give beads row by row.", "Give all beads row by row."), pictures.beads),
    "spelling": _Maker(("Copy the type off the tag.", "Copy down the type off the tag."), pictures.spelling, 3.0),
    "signature": _Maker(("Decode a scribbled symbol.", "Decode a hastily scribbled symbol."), pictures.signature, 3.0),
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
    question = maker.prompts[pictures.pick(rng, len(maker.prompts))].format(**slots)
    return Example(f"{name}-{index}", question, answer, Pixels(picture))


def pretraining_task(name: str, seed: int, train: int, val: int, test: int) -> Task:
    """One of `PRETRAINING_TASKS` drawn anew, to see what a base can do; it may hold what the base was trained on."""
    return Task(
        name,
        train=_split(name, "train", seed, train),
        val=_split(name, "val", seed, val),
        test=_split(name, "test", seed, test),
    )


def _split(name: str, split: str, seed: int, count: int) -> tuple[Example, ...]:
    rng = generator(seed, "pretraining task", name, split)
    return tuple(_example(rng, name, index) for index in range(count))
