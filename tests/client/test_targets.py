"""Adapters on any Linear layer: which ones a target names, and the vision side against plain PEFT."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fedstrata.client.evaluation import Answerer
from fedstrata.client.lora import Cohort
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, batches, train
from fedstrata.core import shapes
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection, from_dict
from fedstrata.core.errors import BadInput
from fedstrata.core.peftfolder import save_peft
from fedstrata.core.records import Knowledge
from fedstrata.scenarios.stream import Example
from fedstrata.strategies.base import Everything
from fedstrata.strategies.finetune import FinetuneConfig
from tests.client import cohorts

examples = partial(cohorts.examples, bare=True)

SCALING = 2.0
SETTINGS = TrainSection(lr=1e-2, batch_size=3, local_epochs=2, warmup_steps=2, max_grad_norm=0.5)
PROJECTOR = "multi_modal_projector.linear_1"
TOWER = "vision_tower.encoder.layers.0.self_attn.q_proj"


def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Llama's norm without its detour over float32."""
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def load(llava: Path, *targets: str, double: bool = False, projector: str = "frozen", **lora: Any) -> BaseModel:
    section = ModelSection(name=str(llava), attention="sdpa" if double else "eager", max_new_tokens=4)
    base = BaseModel(section, LoraSection(targets=list(targets), **lora), projector)
    if double:
        base.model.double()
        for module in base.model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = partial(norm, module)
    return base


def filled(base: BaseModel, seed: int, spread: float = 0.05) -> Flat:
    """An adapter whose B is not zero."""
    flat = fresh(base.layout, 4, seed)
    return flat + np.random.default_rng(seed).normal(0, spread, flat.shape).astype(np.float32)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]),
        (["self_attn.q_proj"], [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]),
        (["layers.1.self_attn.q_proj"], ["model.language_model.layers.1.self_attn.q_proj"]),
        ([PROJECTOR], [f"model.{PROJECTOR}"]),
        ([TOWER], [f"model.{TOWER}"]),
        (["mlp.fc1"], [f"model.vision_tower.encoder.layers.{i}.mlp.fc1" for i in range(3)]),
    ],
)
def test_a_target_names_layers_of_the_language_model_first(
    llava: Path, targets: list[str], expected: list[str]
) -> None:
    tree = {"model": {"name": str(llava)}, "strategy": {"name": "finetune"}, "lora": {"targets": targets}}
    layout = shapes.layout(from_dict(tree, FinetuneConfig))
    assert [name for name, _, _ in layout.modules] == expected
    assert load(llava, *targets).layout == layout


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("fc1", "fc1: no Linear layer of the language model has this name; elsewhere there is model.vision_tower"),
        ("lm_head", "lm_head: only the language model, the projector and the tower can be adapted"),
        ("nowhere.at.all", "nowhere.at.all: no Linear layer"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused(llava: Path, target: str, part: str) -> None:
    with pytest.raises(BadInput, match=f"lora.targets: {part}"):
        load(llava, "q_proj", target)


def test_a_projector_is_adapted_or_trained_whole(llava: Path) -> None:
    with pytest.raises(BadInput, match="strategy.projector=shared trains this layer whole"):
        load(llava, PROJECTOR, projector="shared")


def test_dropout_stays_inside_the_language_model(llava: Path) -> None:
    with pytest.raises(BadInput, match=r"lora\.dropout: must be 0"):
        load(llava, "q_proj", PROJECTOR, dropout=0.1)


def plain_peft(base: BaseModel, job: Job) -> np.ndarray:
    """One client through transformers' own forward from pixels to logits, PEFT and torch's AdamW."""
    rank, targets = base.layout.rank(job.flat), [name for name, _, _ in base.layout.modules]
    peft = get_peft_model(base.model, LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=targets))
    parameters, learned = dict(peft.named_parameters()), []
    for name, factors in base.layout.split(job.flat).items():
        for label, value in zip(("lora_A", "lora_B"), factors, strict=True):
            parameter = parameters[f"base_model.model.{name}.{label}.default.weight"]
            parameter.data = torch.from_numpy(value.copy()).double()
            learned.append(parameter)
    optimiser = torch.optim.AdamW(learned, lr=SETTINGS.lr, weight_decay=0.0)
    for step, rows in enumerate(batches(len(job.examples), SETTINGS, job.seed), 1):
        optimiser.param_groups[0]["lr"] = SETTINGS.lr * min(1, step / SETTINGS.warmup_steps)
        optimiser.zero_grad(set_to_none=False)
        loss = plain_loss(base, peft, [job.examples[row] for row in rows])
        if loss.requires_grad:  # not where no row has a picture
            loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, SETTINGS.max_grad_norm)
        optimiser.step()
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in learned])


def plain_loss(base: BaseModel, peft: Any, rows: list[Example]) -> torch.Tensor:
    """Mean cross-entropy over the batch's answer tokens, one example after the other."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example, row in zip(rows, base.tokenise(rows, 512), strict=True):
        inputs = {"input_ids": torch.tensor([row.prompt + row.answer])}
        if example.image is not None:
            images = base.processor.image_processor(images=[example.image.open()], return_tensors="pt")
            inputs["pixel_values"] = images["pixel_values"].double()
        logits = peft(**inputs).logits[0, len(row.prompt) - 1 : -1]
        total = total + F.cross_entropy(logits, torch.tensor(row.answer), reduction="sum")
        count += len(row.answer)
    return total / count


@pytest.mark.parametrize(
    "targets", [(PROJECTOR,), (TOWER,), ("q_proj", PROJECTOR, "vision_tower.encoder.layers.0.mlp.fc2")]
)
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_cohort_on_the_vision_side_equals_plain_peft(
    llava: Path, trained: list[Cohort], targets: tuple[str, ...], micro_batch: int
) -> None:
    base = load(llava, *targets, double=True)
    jobs = [Job(examples(count, seed=c), filled(base, c), seed=c) for c, count in enumerate((7, 4))]
    settings = TrainSection(**{**vars(SETTINGS), "micro_batch": micro_batch})
    train(base, jobs, settings, SCALING, dtype=torch.float64)
    for row, job in enumerate(jobs):
        expected = plain_peft(load(llava, *targets, double=True), job)
        update = np.linalg.norm(expected - job.flat)
        assert update > 0.05
        assert np.linalg.norm(trained[0].flat[row].detach().numpy() - expected) / update < 1e-9


@pytest.mark.parametrize("target", [PROJECTOR, TOWER])
def test_a_cache_that_is_full_changes_nothing(
    llava: Path, trained: list[Cohort], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (2**29, 1):
        base = load(llava, target, double=True)
        monkeypatch.setattr("fedstrata.client.features.CACHE_BYTES", size)
        jobs = [Job(examples(count, seed=c), filled(base, c), seed=c) for c, count in enumerate((5, 4))]
        train(base, jobs, SETTINGS, SCALING, dtype=torch.float64)
    assert torch.allclose(trained[0].flat, trained[1].flat, rtol=0, atol=1e-9)


@pytest.mark.parametrize("target", [PROJECTOR, TOWER])
def test_answers_use_each_rows_mixture_and_equal_pefts(llava: Path, tmp_path: Path, target: str) -> None:
    base, rows = load(llava, target), examples(4)
    flats = tuple(filled(base, seed, 0.5) for seed in range(2))
    answerer = Answerer(base, Knowledge(flats), Everything(2), SCALING)
    answerer.router = OneEach()
    mixed = answerer.answer(rows, 0, 4, 512).texts
    for index, flat in enumerate(flats):
        save_peft(tmp_path / str(index), base.layout, flat, SCALING, str(llava))
        other = load(llava, target)
        other.model = PeftModel.from_pretrained(other.model, str(tmp_path / str(index))).base_model.model
        alone = Answerer(other, Knowledge(()), Everything(0), SCALING).answer(rows, 0, 1, 512).texts
        assert [mixed[row] for row in range(index, 4, 2)] == [alone[row] for row in range(index, 4, 2)]


class OneEach:
    """Even rows by the first subspace, odd ones by the second."""

    needs_features = False

    def weights(self, inputs: Any) -> np.ndarray:
        return np.eye(2, dtype=np.float32)[np.arange(len(inputs.ids)) % 2]
