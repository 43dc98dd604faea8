"""SSA in one forward, and cohort training, against the plain ways of doing the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fedstrata.client.lora import adapted
from fedstrata.client.mixture import Mixture
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, answer_loss, batches, collate, train
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.core.peftfolder import save_peft
from fedstrata.scenarios.stream import Example
from tests.client.cohorts import examples

SCALING = 2.0
SETTINGS = TrainSection(lr=1e-2, batch_size=3, local_epochs=2, warmup_steps=2, max_grad_norm=0.5)


@pytest.fixture(scope="module")
def base(llava: Path) -> BaseModel:
    torch.set_num_threads(1)
    return BaseModel(ModelSection(name=str(llava)), LoraSection())


@pytest.fixture
def base64(llava: Path) -> BaseModel:
    torch.set_num_threads(1)
    model = BaseModel(ModelSection(name=str(llava)), LoraSection())
    model.model.double()
    return model


def filled(base: BaseModel, seed: int, rank: int = 4) -> Flat:
    """An adapter whose B is not zero."""
    flat = fresh(base.layout, rank, seed)
    return flat + np.random.default_rng(seed).normal(0, 0.05, flat.shape).astype(np.float32)


def hidden(base: BaseModel, rows: list[Example]) -> torch.Tensor:
    prepared = base.prepare(rows, 512)
    batch = base.embed([p.prompt for p in prepared], [p.features for p in prepared], left=True)
    with torch.no_grad():
        out = base.model.model.language_model(inputs_embeds=batch.embeds, attention_mask=batch.mask)
    return out.last_hidden_state[batch.mask == 1]


def test_ssa_in_one_forward_equals_the_weighted_sum_of_separate_deltas(base: BaseModel) -> None:
    flats = [filled(base, seed) for seed in range(3)]
    layer = base.layout.modules[0][0]
    x = torch.randn(4, 5, base.layout.modules[0][2])
    alpha = torch.softmax(torch.randn(4, 3), dim=1)
    bank = Mixture.of(flats, base.layout, SCALING, base.device, torch.float32)
    bank.activate(alpha)
    with adapted(base, bank), torch.no_grad():
        mixed = base.module(layer)(x)
        plain = torch.nn.functional.linear(x, base.module(layer).weight)
    expected = plain.clone()
    for row in range(4):
        for i, flat in enumerate(flats):  # K separate forwards of the delta
            a, b = (torch.from_numpy(factor) for factor in base.layout.split(flat)[layer])
            expected[row] += alpha[row, i] * SCALING * (x[row] @ a.T @ b.T)
    assert torch.allclose(mixed, expected, atol=1e-5)


def test_a_mixed_batch_answers_each_row_as_it_is_answered_alone(base: BaseModel) -> None:
    flats, rows = [filled(base, seed) for seed in range(3)], examples(4)
    alpha = torch.softmax(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * 3, dim=1)
    bank = Mixture.of(flats, base.layout, SCALING, base.device, torch.float32)
    with adapted(base, bank):
        bank.activate(alpha)
        together = hidden(base, rows)
        alone = []
        for index, row in enumerate(rows):
            bank.activate(alpha[index : index + 1])
            alone.append(hidden(base, [row]))
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_weight_one_on_a_subspace_equals_peft_with_its_exported_folder(
    base: BaseModel, llava: Path, tmp_path: Path
) -> None:
    flats, rows = [filled(base, seed) for seed in range(2)], examples(2)
    bank = Mixture.of(flats, base.layout, SCALING, base.device, torch.float32)
    bank.activate(torch.tensor([[0.0, 1.0]]).expand(2, 2))
    with adapted(base, bank):
        ours = hidden(base, rows)
    save_peft(tmp_path / "one", base.layout, flats[1], SCALING, str(llava))
    other = BaseModel(ModelSection(name=str(llava)), LoraSection())
    peft = PeftModel.from_pretrained(other.model, str(tmp_path / "one"))
    other.model = peft.base_model.model
    assert torch.allclose(ours, hidden(other, rows), atol=1e-5)


def test_the_base_is_as_before_when_the_bank_is_closed(base: BaseModel) -> None:
    rows, before = examples(2), base.hash
    plain = hidden(base, rows)
    bank = Mixture.of([filled(base, 0)], base.layout, SCALING, base.device, torch.float32)
    with adapted(base, bank):
        assert not torch.equal(hidden(base, rows), plain)
    assert torch.equal(hidden(base, rows), plain)
    del base.hash  # a cached property
    assert base.hash == before


def plain_peft(base: BaseModel, job: Job, dtype: torch.dtype) -> Flat:
    """One client the ordinary way: PEFT, torch's AdamW and gradient clipping."""
    rank = base.layout.rank(job.flat)
    targets = [name for name, _, _ in base.layout.modules]
    peft = get_peft_model(base.model, LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=targets))
    parameters = dict(peft.named_parameters())
    views = base.layout.split(job.flat)
    trained = []
    for name, factors in views.items():
        for label, value in zip(("lora_A", "lora_B"), factors, strict=True):
            parameter = parameters[f"base_model.model.{name}.{label}.default.weight"]
            parameter.data = torch.from_numpy(value.copy()).to(dtype)
            trained.append(parameter)
    optimiser = torch.optim.AdamW(trained, lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
    prepared = base.prepare(job.examples, 512)
    for step, rows in enumerate(batches(len(job.examples), SETTINGS, job.seed), 1):
        optimiser.param_groups[0]["lr"] = SETTINGS.lr * min(1, step / SETTINGS.warmup_steps)
        optimiser.zero_grad()
        answer_loss(base, collate(base, [[prepared[row] for row in rows]]), 1).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.max_grad_norm)
        optimiser.step()
    result = np.concatenate([parameter.detach().double().numpy().ravel() for parameter in trained])
    base.model = peft.unload()
    return result


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_a_cohort_equals_plain_peft_client_by_client(base64: BaseModel, clients: int) -> None:
    jobs = [Job(examples(3 + 4 * (c % 3), seed=c), filled(base64, c), seed=c) for c in range(clients)]  # ragged data
    base64.prepare(jobs[0].examples, 512)
    fused = train(base64, jobs, SETTINGS, SCALING, dtype=torch.float64)
    for job, trained in zip(jobs, fused, strict=True):
        expected = plain_peft(base64, job, torch.float64)
        update = expected - job.flat
        error = np.linalg.norm(trained.flat - expected) / np.linalg.norm(update)
        assert np.linalg.norm(update) > 0.1
        assert error < 1e-6  # the adapter itself travels in float32
        assert trained.steps == len(batches(len(job.examples), SETTINGS, job.seed))


def test_a_clients_result_does_not_depend_on_who_shares_its_cohort(base: BaseModel) -> None:
    jobs = [Job(examples(3 + 2 * c, seed=c), filled(base, c), seed=c) for c in range(3)]
    together = train(base, jobs, SETTINGS, SCALING)
    for job, trained in zip(jobs, together, strict=True):
        alone = train(base, [job], SETTINGS, SCALING)[0]
        update = np.linalg.norm(alone.flat - job.flat)
        assert np.linalg.norm(alone.flat - trained.flat) / update < 1e-3


def test_every_client_moves_even_with_one_example(base: BaseModel) -> None:
    """The published code's warm-up gives a client with one step learning rate 0."""
    job = Job(examples(1), fresh(base.layout, 4, 0), seed=0)
    trained = train(base, [job], TrainSection(local_epochs=1), SCALING)[0]
    assert trained.steps == 1
    assert np.abs(trained.flat - job.flat).max() > 0
