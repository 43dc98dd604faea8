"""MoELoRA: the gated product's formula, and a federation of experts with their gates."""

from typing import Any

import numpy as np
import pytest
import torch

from fedstrata.client.banks import Sole, bank_of
from fedstrata.client.lora import Cohort, adapted
from fedstrata.client.lowrank import gated, low_rank
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, train
from fedstrata.core.adapters import Flat, Layout, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.core.errors import BadInput
from fedstrata.core.peftfolder import peft_config
from fedstrata.core.records import Knowledge
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.strategies.base import Setup
from fedstrata.strategies.moelora import MoELora, MoELoraConfig

CLIENTS, ROWS, LENGTH, INNER, OUT, RANK, EXPERTS = 2, 3, 4, 5, 6, 4, 2


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, A, B, G of two clients."""
    x = drawn(CLIENTS * ROWS, LENGTH, INNER)
    factors = (drawn(CLIENTS, RANK, INNER, seed=1), drawn(CLIENTS, OUT, RANK, seed=2))
    return x, *factors, drawn(CLIENTS, EXPERTS, INNER, seed=3)


def test_every_token_gets_its_experts_at_its_own_weights(parts: Any) -> None:
    """Against the sum written out token by token."""
    x, a, b, gate = parts
    found = gated(x, x, a, b, gate, 0.5)
    for row, client in enumerate([0] * ROWS + [1] * ROWS):
        for place, token in enumerate(x[row]):
            weights = torch.exp(gate[client] @ token)
            weights = weights / weights.sum()
            expected = torch.zeros(OUT, dtype=torch.float64)
            for expert in range(EXPERTS):
                ranks = slice(expert * RANK // EXPERTS, (expert + 1) * RANK // EXPERTS)
                expected += 0.5 * weights[expert] * (b[client][:, ranks] @ (a[client][ranks] @ token))
            assert torch.allclose(found[row, place], expected, atol=1e-12)


def test_one_expert_is_lora_whatever_its_gate(parts: Any) -> None:
    x, a, b, gate = parts
    assert torch.allclose(gated(x, x, a, b, gate[:, :1], 0.5), low_rank(x, a, b, 0.5), atol=1e-12)


def test_the_gate_of_equal_experts_does_not_matter_and_has_no_gradient(parts: Any) -> None:
    x, a, b, gate = parts
    half = RANK // 2
    a, b = torch.cat([a[:, :half]] * 2, 1), torch.cat([b[:, :, :half]] * 2, 2)
    gate = gate.requires_grad_()
    found = gated(x, x, a, b, gate, 0.5)
    assert torch.allclose(found, low_rank(x, a[:, :half], b[:, :, :half], 0.5), atol=1e-12)
    (gradient,) = torch.autograd.grad(found.square().sum(), gate)
    assert gradient.abs().max() < 1e-12


def test_gates_sum_to_one(parts: Any) -> None:
    """Experts that answer a constant show the sum of their weights."""
    x, _, _, gate = parts
    ones = torch.ones(CLIENTS * ROWS, LENGTH, INNER, dtype=torch.float64)
    a = torch.full((CLIENTS, RANK, INNER), 1 / INNER, dtype=torch.float64)
    b = torch.full((CLIENTS, OUT, RANK), EXPERTS / RANK, dtype=torch.float64)
    assert torch.allclose(gated(ones, x, a, b, gate, 1.0), torch.ones(1, dtype=torch.float64), atol=1e-12)


def base() -> BaseModel:
    torch.set_num_threads(1)
    model = BaseModel(ModelSection(), LoraSection(rank=RANK, targets=["q_proj", "down_proj"]), "shared")
    model.train_as(MoELoraConfig(experts=EXPERTS))
    return model


def examples(count: int, seed: int) -> list[Example]:
    draw = np.random.default_rng(seed)
    pictures = [Pixels(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
    return [Example(str(i), f"how many {i}?", ("four", "a red one")[i % 2], p) for i, p in enumerate(pictures)]


def filled(layout: Layout, seed: int) -> Flat:
    flat = fresh(layout, RANK, seed)
    return flat + np.random.default_rng(seed).normal(0, 0.05, flat.shape).astype(np.float32)


def test_its_layout_has_the_gates_behind_the_factors_and_survives_the_wire() -> None:
    layout = base().layout
    inner = sum(inner for _, _, inner in layout.modules)
    assert layout.fixed == EXPERTS * inner
    assert Layout.from_json(layout.to_json()) == layout
    assert layout.rank(fresh(layout, RANK, 0)) == RANK
    views = layout.views(fresh(layout, RANK, 0))
    gates = [view for name, view in views.items() if name.endswith("lora_router")]
    assert len(gates) == len(layout.modules)
    assert not any(gate.any() for gate in gates)
    assert layout.hash != base().found.hash


def test_a_fused_cohort_trains_gates_and_gives_every_ragged_client_what_it_gets_alone() -> None:
    model = base()
    model.model.double()
    settings = TrainSection(lr=1e-2, batch_size=2, local_epochs=2, warmup_steps=1)
    jobs = [Job(examples(2 + 3 * c, c), filled(model.layout, c), c) for c in range(2)]
    together = train(model, jobs, settings, 2.0, dtype=torch.float64)
    for job, trained in zip(jobs, together, strict=True):
        (alone,) = train(model, [job], settings, 2.0, dtype=torch.float64)
        update = np.linalg.norm(alone.flat - job.flat)
        assert update > 0.01
        assert np.linalg.norm(trained.flat - alone.flat) / update < 1e-4
        before, after = (model.layout.views(flat) for flat in (job.flat, trained.flat))
        assert all(np.abs(after[name] - before[name]).max() > 0 for name, _ in model.layout.own)


def test_the_bank_that_answers_is_what_was_trained() -> None:
    model = base()
    flat = filled(model.layout, 0)
    adapter, tail = model.layout.cut(flat)
    bank = bank_of(model, Knowledge((adapter,), shared=tail), 2.0)
    assert isinstance(bank, Sole)
    rows = model.prepare(examples(2, 0), 512)

    def hidden() -> torch.Tensor:
        with torch.no_grad():
            batch = model.embed([row.prompt for row in rows], [row.features for row in rows], left=True)
            found: torch.Tensor = model.backbone(inputs_embeds=batch.embeds, attention_mask=batch.mask)[0]
        return found

    plain = hidden()
    bank.activate(torch.ones(2, 1))
    with bank.on(model):
        answered = hidden()
    with adapted(model, Cohort.of([flat], model.layout, 2.0, model.device, torch.float32)):
        assert torch.equal(hidden(), answered)
    assert torch.equal(hidden(), plain)
    assert not torch.allclose(answered, plain)
    with pytest.raises(ValueError, match="answers at weight 1"):
        bank.activate(torch.tensor([[1.0], [0.5]]))


def test_its_adapter_has_no_peft_folder() -> None:
    with pytest.raises(BadInput, match="adapters of kind moelora have parts that PEFT's format does not hold"):
        peft_config(base().layout, RANK, 2.0)


def test_experts_that_do_not_share_the_rank_evenly_are_refused(setup: Setup) -> None:
    with pytest.raises(BadInput, match=r"strategy\.experts: must be a divisor of the adapter's rank, 3, got 2"):
        MoELora(MoELoraConfig(experts=2), setup)
    with pytest.raises(BadInput, match=r"strategy\.experts: must be at least 1, got 0"):
        MoELoraConfig(experts=0)
    with pytest.raises(BadInput, match=r"lora\.kind: must be lora or rslora with strategy\.name=moelora, got 'ia3'"):
        MoELoraConfig().trains(Layout((("layer", 1, 2),), kind="ia3"), 4, lambda: 4)
    assert not MoELora.uses_task_identity
