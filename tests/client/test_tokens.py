"""Tokens that are kept: what comes back is what tokenising again would give."""

from pathlib import Path

import numpy as np
import pytest

from fedstrata.client import tokens as module
from fedstrata.client.model import BaseModel
from fedstrata.client.tokens import tokens
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example, Pixels

SETTINGS = TrainSection()


@pytest.fixture
def base(llava: Path) -> BaseModel:
    return BaseModel(ModelSection(name=str(llava)), LoraSection())


def examples(count: int) -> list[Example]:
    pictures = [Pixels(np.full((32, 32, 3), shade, np.uint8)) for shade in range(count)]
    more = [(("and?", "blue"),) * (number % 2) for number in range(count)]
    return [
        Example(str(n), f"what is {n // 2}?", "red", p if n % 3 else None, m)
        for n, (p, m) in enumerate(zip(pictures, more, strict=True))
    ]


def test_kept_tokens_are_those_of_tokenising_again(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    share = examples(6)
    expected = base.tokenise(share, SETTINGS.max_length)
    assert tokens(base, share, SETTINGS) == expected
    monkeypatch.setattr(BaseModel, "tokenise", None)  # nothing is left to be tokenised
    assert tokens(base, share[::-1], SETTINGS) == expected[::-1]


def test_each_example_keeps_its_own_picture(base: BaseModel) -> None:
    same = [Example(str(shade), "what?", "red", Pixels(np.full((32, 32, 3), shade, np.uint8))) for shade in range(3)]
    assert [row.image for row in tokens(base, same, SETTINGS)] == [example.image for example in same]
    assert [row.image for row in tokens(base, same, SETTINGS)] == [example.image for example in same]


def test_a_row_is_tokenised_anew_under_another_limit(base: BaseModel) -> None:
    long = [Example("long", "what colour is it? " * 9, "red")]
    whole = tokens(base, long, SETTINGS)
    cut = tokens(base, long, TrainSection(max_length=40, overlong="cut"))
    assert len(cut[0].prompt) < len(whole[0].prompt)
    for _ in range(2):
        with pytest.raises(BadInput, match="example long: must have at most train.max_length = 40"):
            tokens(base, long, TrainSection(max_length=40))


def test_the_oldest_are_forgotten_behind_the_limit(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    share = examples(6)
    expected = base.tokenise(share, SETTINGS.max_length)
    size = sum(len(row.prompt) + len(row.answer) for row in expected[-3:])
    monkeypatch.setattr(module, "LIMIT", size)
    assert tokens(base, share, SETTINGS) == expected
    kept = module._kept[base]
    assert kept.size <= size
    assert 0 < len(kept.rows) < 6
    assert tokens(base, share, SETTINGS) == expected
