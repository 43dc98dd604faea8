"""Identity features by text, by picture, and by both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedstrata.client.identity import Words, identify, identity
from fedstrata.client.model import BaseModel
from fedstrata.client.release import release
from fedstrata.core.config import LoraSection, ModelSection, RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.core.identity import cosines
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.strategies.disco import DiscoConfig

TOWER = LoraSection(rank=2, targets=["vision_tower.encoder.layers.0.self_attn.q_proj"])


def picture(seed: int) -> Pixels:
    return Pixels(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


ROWS = [
    Example("a", "what colour is the shape?", "red", picture(0)),
    Example("b", "how many lines are there?", "two", picture(1)),
    Example("c", "what is the capital?", "rome"),
    Example("d", "how tall is the tower?", "very"),
]


@pytest.fixture(scope="module")
def base(llava: Path) -> BaseModel:
    torch.set_num_threads(1)
    return BaseModel(ModelSection(name=str(llava)), LoraSection(rank=2))


@pytest.fixture(scope="module")
def tiny() -> BaseModel:
    torch.set_num_threads(1)
    return BaseModel(ModelSection(), LoraSection())


def test_text_is_the_encoders_own_feature(tiny: BaseModel) -> None:
    words = identity(tiny)
    assert isinstance(words, Words)
    found = words.encode(ROWS).numpy()
    assert found.tobytes() == tiny.encoder.encode([row.question for row in ROWS]).numpy().tobytes()
    assert (words.name, words.tau, words.epsilon) == ("base", tiny.encoder.tau, tiny.encoder.epsilon)


def by_hand(base: BaseModel, source: Pixels) -> torch.Tensor:
    """The tower's last layer but one, without the class token, averaged over the patches."""
    model: Any = base.model
    pixels = base.processor.image_processor(images=[source.open()], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    return F.normalize(hidden[0, 1:].mean(0), dim=0)


@pytest.mark.parametrize("trained", [LoraSection(rank=2), TOWER])
def test_a_picture_is_the_mean_of_the_frozen_towers_tokens(llava: Path, trained: LoraSection) -> None:
    base = BaseModel(ModelSection(name=str(llava)), trained)
    found = identity(base, "image").encode(ROWS[:2])
    assert found.shape == (2, identity(base, "image").dim) == (2, 32 + 1)
    for row, example in zip(found, ROWS[:2], strict=True):
        assert isinstance(example.image, Pixels)
        assert torch.allclose(row[:-1], by_hand(base, example.image), atol=1e-6)
        assert row[-1] == 0


def test_rows_without_a_picture_are_alike_and_unlike_those_with_one(base: BaseModel) -> None:
    found = identity(base, "image").encode(ROWS).numpy()
    near = cosines(found, found)
    assert near[2, 3] == 1
    assert near[:2, 2:].tolist() == [[0, 0], [0, 0]]


def test_both_is_the_mean_of_the_two_cosines(tiny: BaseModel) -> None:
    text, image, both = (identity(tiny, kind) for kind in ("text", "image", "both"))
    one, two, mixed = (kind.encode(ROWS).numpy() for kind in (text, image, both))
    assert np.allclose(cosines(mixed, mixed), (cosines(one, one) + cosines(two, two)) / 2, atol=1e-6)
    assert both.dim == text.dim + image.dim
    assert (both.name, both.tau, both.epsilon) == ("base+tower", (0.56 + 0.9) / 2, (0.15 + 0.05) / 2)
    assert np.linalg.norm(mixed, axis=1) == pytest.approx(both.norm)


def test_pictures_are_looked_at_once(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity(base, "image").encode(ROWS)
    monkeypatch.setattr(base.pictures.vision, "glance", lambda sources: pytest.fail("looked again"))  # type: ignore[union-attr]
    assert torch.equal(identity(base, "image").encode(ROWS), first)


def test_the_token_is_the_mean_and_a_bound_cuts_it(base: BaseModel) -> None:
    options = DiscoConfig(token="image", token_clip=0.5)
    config = RunConfig(strategy=options)
    token = identify(base, ROWS, "image")
    rows = identity(base, "image").encode(ROWS)
    assert token.count == 4
    assert token.value == pytest.approx(rows.mean(0).numpy(), abs=1e-6)
    assert release(base, ROWS, config, b"", "data").value == pytest.approx(token.value / 2, abs=1e-6)


def test_a_base_without_vision_has_no_image_token(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "processor", None)
    with pytest.raises(BadInput, match=r"strategy\.token: needs a base that sees pictures, model\.name '.*' is a"):
        identity(base, "image")


def test_another_word_is_refused() -> None:
    with pytest.raises(BadInput, match=r"strategy\.token: must be text \| image \| both, got 'sound'"):
        DiscoConfig(token="sound")
