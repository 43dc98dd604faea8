"""Gradient checkpointing: the same adapters from fewer kept activations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedstrata.client.batching import collate
from fedstrata.client.checkpointing import checkpointed
from fedstrata.client.lora import Cohort, adapted
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, answer_loss, train
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example, Pixels

SCALING = 2.0
SETTINGS: dict[str, Any] = {"lr": 1e-2, "batch_size": 3, "local_epochs": 2, "warmup_steps": 2}


def load(llava: Path, kind: str = "lora", targets: tuple[str, ...] = ("q_proj", "up_proj", "down_proj")) -> BaseModel:
    return BaseModel(ModelSection(name=str(llava)), LoraSection(kind=kind, targets=list(targets)))


@pytest.fixture(scope="module")
def base(llava: Path) -> BaseModel:
    return load(llava)


def examples(count: int, seed: int) -> list[Example]:
    draw = np.random.default_rng(seed)
    pictures = [Pixels(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
    return [Example(str(i), f"what is shape {i}?", ("red", "4")[i % 2], p) for i, p in enumerate(pictures)]


def filled(base: BaseModel, seed: int) -> Flat:
    flat = fresh(base.layout, 4, seed)
    return flat + np.random.default_rng(seed).normal(0, 0.05, flat.shape).astype(np.float32)


def updates(base: BaseModel, checkpointing: bool, dropout: float, **settings: Any) -> list[Flat]:
    jobs = [Job(examples(count, c), filled(base, c), seed=c) for c, count in enumerate((7, 4))]
    section = TrainSection(**SETTINGS, **settings, checkpointing=checkpointing)
    return [done.flat for done in train(base, jobs, section, SCALING, dropout=dropout)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_the_adapters_are_the_same_bits(base: BaseModel, dropout: float, micro_batch: int) -> None:
    plain = updates(base, False, dropout, micro_batch=micro_batch)
    again = updates(base, True, dropout, micro_batch=micro_batch)
    for one, other in zip(plain, again, strict=True):
        assert np.array_equal(one, other)
        assert np.abs(one).max() > 0


def test_where_every_layer_is_peft_s_own_too(llava: Path) -> None:
    base = load(llava, "dora")
    plain, again = updates(base, False, 0.3), updates(base, True, 0.3)
    assert all(np.array_equal(one, other) for one, other in zip(plain, again, strict=True))


def test_with_adapters_on_the_vision_side(llava: Path) -> None:
    base = load(llava, targets=("q_proj", "multi_modal_projector.linear_1"))
    plain, again = updates(base, False, 0.0), updates(base, True, 0.0)
    assert all(np.array_equal(one, other) for one, other in zip(plain, again, strict=True))


def kept(base: BaseModel, checkpointing: bool) -> int:
    """Bytes of activations that one step keeps for its backward pass, without the base's own weights.

    What a checkpointed layer is given is kept too, where no hook sees it.
    """
    weights = {parameter.data_ptr() for parameter in base.model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # so that no other takes its place
        return tensor

    held: list[torch.Tensor] = []
    cohort = Cohort.of([filled(base, 0)], base.layout, SCALING, base.device, torch.float32)
    batch = collate(base, [base.tokenise(examples(4, 0), 512)])
    with adapted(base, cohort), base.training(checkpointing):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = answer_loss(base, batch, 1)
        torch.autograd.backward(loss.sum())
    layers = int(base.model.config.text_config.num_hidden_layers)
    return sum(seen.values()) + (layers * batch.embeds.nbytes if checkpointing else 0)


def test_far_fewer_bytes_wait_for_the_backward_pass(base: BaseModel) -> None:
    plain, again = kept(base, False), kept(base, True)
    assert 0 < again < plain / 3


def test_the_base_is_as_it_was_afterwards(base: BaseModel) -> None:
    before = [vars(module).get("forward") for module in base.model.modules()]
    updates(base, True, 0.0)
    assert [vars(module).get("forward") for module in base.model.modules()] == before


def test_a_model_whose_layers_are_not_fit_for_it_is_refused() -> None:
    with (
        pytest.raises(BadInput, match=r"train.checkpointing: the layers of a Linear cannot be checkpointed"),
        checkpointed(nn.Linear(2, 2)),
    ):
        pass
