"""The tiny base as it ships: an ordinary folder, small, and honest about what it cannot do yet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import fedstrata.client
from fedstrata.client.pretrain import collate, encode
from fedstrata.scenarios.mini import CHANCE, MINI_TASKS, mini_task, prompts
from fedstrata.scenarios.pretraining import pretraining_examples
from fedstrata.scenarios.stream import Example

TINY = Path(fedstrata.client.__file__).parent / "tiny"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(TINY).eval()


def _chat(processor: Any, question: str, image: bool = True) -> str:
    content = [{"type": "image"}] * image + [{"type": "text", "text": question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return text


def _answers(model: Any, processor: Any, examples: list[Example]) -> list[str]:
    """Greedy answers, as a user of the folder would get them."""
    batch = processor(
        text=[_chat(processor, example.question) for example in examples],
        images=[example.image.open() for example in examples if example.image is not None],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=14)
    texts: list[str] = processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _matches(model: Any, processor: Any, examples: list[Example]) -> float:
    answers = _answers(model, processor, examples)
    return sum(a == e.answer for a, e in zip(answers, examples, strict=True)) / len(examples)


def test_the_folder_is_small_and_complete() -> None:
    files = {path.name for path in TINY.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= files
    assert {"text_encoder.json", "text_encoder.safetensors", "generation_config.json"} <= files
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 8_000_000


def test_the_model_is_what_the_design_says(model: Any) -> None:
    assert model.num_parameters() <= 1_600_000
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.image_seq_length == 16


def test_the_chat_template_is_short_and_vicuna_like(processor: Any) -> None:
    assert _chat(processor, "How many?") == "USER: <image>\nHow many? ASSISTANT:"
    assert _chat(processor, "How many?", image=False) == "USER: How many? ASSISTANT:"


def test_the_processor_gives_what_pretraining_saw(processor: Any) -> None:
    for example in pretraining_examples(11, 8):
        assert example.image is not None
        text = _chat(processor, example.question)
        batch = processor(text=[text], images=[example.image.open()], return_tensors="pt")
        ids, start = encode(processor.tokenizer, example)
        assert batch["input_ids"][0].tolist() == ids[:start]
        pixels = collate(processor.tokenizer, processor, [example])["pixel_values"]
        assert torch.allclose(batch["pixel_values"], pixels, atol=1e-6)


def test_words_of_the_stream_are_single_tokens(processor: Any) -> None:
    for name in MINI_TASKS:
        for prompt in prompts(name):
            words = prompt.replace("{}", "").replace(",", " ,").rstrip(".?").split()
            assert len(processor.tokenizer(prompt.replace("{} ", ""), add_special_tokens=False)["input_ids"]) == len(
                words
            ) + prompt.endswith((".", "?"))


def test_it_learnt_its_own_tasks(model: Any, processor: Any) -> None:
    """On fresh draws of the pre-training tasks it answers a good part exactly; a random base answers none."""
    assert _matches(model, processor, pretraining_examples(12345, 120)) >= 0.3


@pytest.mark.parametrize("name", MINI_TASKS)
def test_it_starts_without_knowing_the_stream(name: str, model: Any, processor: Any) -> None:
    """Exact match before any training is at most chance + 10 points; no caption is ever right."""
    right = _matches(model, processor, list(mini_task(name, 3, 0, 0, 120).test))
    assert right <= (CHANCE[name] + 0.1 if name != "captions" else 0.0)


def test_the_picture_changes_what_it_says(model: Any, processor: Any) -> None:
    examples = pretraining_examples(77, 40)
    plain = [np.full_like(np.asarray(example.image.open()), 200) for example in examples if example.image]
    from fedstrata.scenarios.stream import Pixels

    dull = [Example(e.id, e.question, e.answer, Pixels(p)) for e, p in zip(examples, plain, strict=True)]
    assert _matches(model, processor, examples) >= _matches(model, processor, dull) + 0.1
