"""A base of fewer bits: bfloat16, and 8 or 4 bits through bitsandbytes where that is installed."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedstrata.client.evaluation import generate
from fedstrata.client.lora import Cohort
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, train
from fedstrata.core import shapes
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection, from_dict
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.strategies.finetune import FinetuneConfig

SCALING = 2.0
SETTINGS = TrainSection(lr=1e-2, batch_size=3, local_epochs=2, warmup_steps=2)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def load(llava: Path, **section: str) -> BaseModel:
    return BaseModel(ModelSection(name=str(llava), max_new_tokens=4, device="cpu", **section), LoraSection())


def examples(count: int, seed: int) -> list[Example]:
    draw = np.random.default_rng(seed)
    pictures = [Pixels(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
    return [Example(str(i), f"what is shape {i}?", ("red", "4")[i % 2], p) for i, p in enumerate(pictures)]


def filled(base: BaseModel, seed: int) -> Flat:
    flat = fresh(base.layout, 4, seed)
    return flat + np.random.default_rng(seed).normal(0, 0.05, flat.shape).astype(np.float32)


def jobs(base: BaseModel) -> list[Job]:
    return [Job(examples(count, c), filled(base, c), seed=c) for c, count in enumerate((7, 4))]


def far(one: Flat, other: Flat, start: Flat) -> float:
    """‖difference‖ / ‖update‖."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other - start))


def test_on_a_bfloat16_base_adapters_gradients_and_moments_are_float32(llava: Path, trained: list[Cohort]) -> None:
    base, plain = load(llava, dtype="bfloat16"), load(llava)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    done, exact = train(base, jobs(base), SETTINGS, SCALING), train(plain, jobs(plain), SETTINGS, SCALING)
    assert {trained[0].flat.dtype, trained[0].gradient.dtype} == {torch.float32}
    for job, ours, theirs in zip(jobs(base), done, exact, strict=True):
        assert ours.flat.dtype == np.float32
        assert 0 < far(ours.flat, theirs.flat, job.flat) < 0.5
        assert ours.loss == pytest.approx(theirs.loss, rel=0.05)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_without_bitsandbytes_it_says_what_to_install(llava: Path, bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BadInput, match=rf"model.quantise: '{bits}' needs bitsandbytes.*pip install 'fedstrata\[gpu\]'"):
        load(llava, quantise=bits)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_base_trains_each_client_as_alone(llava: Path, bits: str) -> None:
    base, plain = load(llava, quantise=bits), load(llava)
    generate(base, examples(2, 0), 512)  # answering must leave nothing behind that training trips over
    done, exact = train(base, jobs(base), SETTINGS, SCALING), train(plain, jobs(plain), SETTINGS, SCALING)
    for job, ours, theirs in zip(jobs(base), done, exact, strict=True):
        alone = train(base, [job], SETTINGS, SCALING)[0]
        assert far(ours.flat, alone.flat, job.flat) < 0.02
        assert ours.loss == pytest.approx(alone.loss, rel=1e-3)
        assert 0 < far(ours.flat, theirs.flat, job.flat) < 1  # moves as on the exact base, not equally


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_only_the_language_models_layers_are_quantised_and_the_layout_is_the_same(llava: Path, bits: str) -> None:
    base = load(llava, quantise=bits)
    small = {name for name, p in base.model.named_parameters() if not p.dtype.is_floating_point}
    assert small == {f"{name}.weight" for name, _, _ in base.layout.modules}
    tree = {"model": {"name": str(llava)}, "strategy": {"name": "finetune"}}
    assert base.layout == shapes.layout(from_dict(tree, FinetuneConfig))
    assert base.hash == load(llava, quantise=bits).hash != load(llava).hash
