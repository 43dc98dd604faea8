"""The loading code on a local LLaVA folder of the real layout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedstrata.client.evaluation import generate
from fedstrata.client.model import BaseModel
from fedstrata.core.config import LoraSection, ModelSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example, Pixels


@pytest.fixture(scope="module")
def base(llava: Path) -> BaseModel:
    torch.set_num_threads(1)
    return BaseModel(ModelSection(name=str(llava), max_new_tokens=4), LoraSection())


def picture(value: int = 0, height: int = 40, width: int = 30) -> Pixels:
    return Pixels(np.full((height, width, 3), value, dtype=np.uint8))


def test_a_llava_folder_of_the_real_layout_is_opened_with_its_own_template(base: BaseModel) -> None:
    example = Example("a", "what colour?", "red", picture())
    assert base.prompt(example) == "USER: <image>\nwhat colour? ASSISTANT:"
    prepared = base.prepare([example], 512)[0]
    assert prepared.features is not None
    assert prepared.prompt.count(base.image_token) == len(prepared.features) == 4  # 32-pixel image, 16-pixel patches
    assert base.tokenizer.decode(prepared.answer) == " red</s>"


def test_a_text_only_example_needs_no_image_token(base: BaseModel) -> None:
    prepared = base.prepare([Example("a", "two and two?", "4")], 512)[0]
    assert prepared.features is None
    assert base.image_token not in prepared.prompt


def test_our_embedding_equals_transformers_own_forward(base: BaseModel) -> None:
    example = Example("a", "what colour?", "red", picture(90))
    prepared = base.prepare([example], 512)[0]
    batch = base.embed([prepared.prompt], [prepared.features], left=False)
    pixels = base.processor.image_processor(images=[example.image.open()], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = base.model(input_ids=torch.tensor([prepared.prompt]), pixel_values=pixels).logits
        hidden = base.model.model.language_model(inputs_embeds=batch.embeds, attention_mask=batch.mask)
        ours = base.model.lm_head(hidden.last_hidden_state)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_answers_do_not_depend_on_the_batch_they_are_generated_in(base: BaseModel) -> None:
    rows = [Example(str(i), "what " * (i + 1), "red", picture(60 * i)) for i in range(3)]
    rows.append(Example("text", "two and two?", "4"))
    assert generate(base, rows, 512) == [generate(base, [row], 512)[0] for row in rows]


def test_a_pictures_features_are_computed_once(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Example("a", "what?", "red", picture(17))
    first = base.image_features([row, row])
    monkeypatch.setattr(base.model, "get_image_features", lambda **_: pytest.fail("computed again"))
    again = base.image_features([row])
    assert torch.equal(first[0], again[0])


def test_the_image_tag_in_a_question_is_refused(base: BaseModel) -> None:
    with pytest.raises(BadInput, match="example x: the question must not hold the image tag"):
        base.prepare([Example("x", "an <image> here", "red", picture())], 512)


def test_an_example_longer_than_max_length_is_refused_by_name(base: BaseModel) -> None:
    with pytest.raises(BadInput, match=r"example long: must have at most train.max_length = 20 tokens, got \d+"):
        base.prepare([Example("long", "what colour is it? " * 9, "red")], 20)


def test_a_target_that_names_no_layer_is_refused(llava: Path) -> None:
    with pytest.raises(BadInput, match="lora.targets: w_proj: no Linear layer"):
        BaseModel(ModelSection(name=str(llava)), LoraSection(targets=["q_proj", "w_proj"]))


def test_a_base_without_an_encoder_runs_until_one_is_asked_for(base: BaseModel) -> None:
    with pytest.raises(BadInput, match="model.text_encoder"):
        _ = base.encoder


def test_the_layout_leaves_the_vision_tower_alone(base: BaseModel) -> None:
    names = [name for name, _, _ in base.layout.modules]
    assert len(names) == 2 * 7
    assert all("language_model" in name for name in names)
