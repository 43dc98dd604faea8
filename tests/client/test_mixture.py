"""Subspaces mixed in one forward, merged into the weights or left out: one mathematics, and an untouched base."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedstrata.client.lora import adapted
from fedstrata.client.mixture import Mixture
from fedstrata.client.model import BaseModel
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import LoraSection, ModelSection
from fedstrata.scenarios.stream import Example

SCALING, MANY = 2.0, 10**9
ALPHA = (0.2, 0.5, 0.3)


@pytest.fixture(scope="module")
def base(llava: Path) -> BaseModel:
    torch.set_num_threads(1)
    return BaseModel(ModelSection(name=str(llava), device="cpu"), LoraSection())


@pytest.fixture
def base64(llava: Path) -> BaseModel:
    torch.set_num_threads(1)
    model = BaseModel(ModelSection(name=str(llava), device="cpu"), LoraSection())
    model.model.double()
    return model


def filled(base: BaseModel, seed: int, rank: int = 4) -> Flat:
    """An adapter whose B is not zero."""
    flat = fresh(base.layout, rank, seed)
    return np.asarray(flat + np.random.default_rng(seed).normal(0, 0.05, flat.shape), dtype=np.float32)


def mixture(base: BaseModel, subspaces: int = 3, dtype: torch.dtype = torch.float32) -> Mixture:
    flats = [filled(base, seed) for seed in range(subspaces)]
    return Mixture.of(flats, base.layout, SCALING, base.device, dtype)


def rows(count: int, *alpha: float) -> torch.Tensor:
    return torch.tensor([alpha or ALPHA]).repeat(count, 1)


def logits(base: BaseModel, count: int = 4) -> torch.Tensor:
    asked = [Example(str(i), f"what is shape {i}?", "red") for i in range(count)]
    prepared = base.tokenise(asked, 512)
    batch = base.embed([row.prompt for row in prepared], [None] * count, left=True)
    with torch.no_grad():
        hidden = base.backbone(inputs_embeds=batch.embeds, attention_mask=batch.mask).last_hidden_state
    found: torch.Tensor = base.head(hidden[batch.mask == 1])
    return found


def answered(base: BaseModel, bank: Mixture, weights: torch.Tensor, tokens: int = 0) -> torch.Tensor:
    with bank.on(base):
        bank.activate(weights, tokens)
        return logits(base, len(weights))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_merged_weights_say_what_the_mixture_says(base: BaseModel) -> None:
    bank = mixture(base)
    mixed, merged = answered(base, bank, rows(4)), answered(base, bank, rows(4), MANY)
    assert error(merged, mixed) < 1e-6
    assert error(mixed, logits(base)) > 1e-2
    assert not torch.equal(merged, mixed)  # two ways, not one


def test_merged_weights_say_it_to_nine_digits_in_float64(base64: BaseModel) -> None:
    bank = mixture(base64, dtype=torch.float64)
    assert error(answered(base64, bank, rows(4), MANY), answered(base64, bank, rows(4))) < 1e-9


def test_the_merge_is_kept_for_the_same_weights_and_made_anew_for_others(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, addmm = [0], torch.addmm

    def counted(*args: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        return addmm(*args)

    monkeypatch.setattr(torch, "addmm", counted)
    bank = mixture(base)
    first = answered(base, bank, rows(4), MANY)
    assert count[0] == len(base.layout.modules)
    answered(base, bank, torch.softmax(torch.randn(4, 3), 1), MANY)  # mixed in between
    assert torch.equal(answered(base, bank, rows(4), MANY), first)
    assert count[0] == len(base.layout.modules)
    answered(base, bank, rows(4, 0.3, 0.5, 0.2), MANY)
    assert torch.equal(answered(base, bank, rows(4), MANY), first)
    assert count[0] == 3 * len(base.layout.modules)


def test_bits_do_not_depend_on_what_was_asked_before(base: BaseModel) -> None:
    weights = torch.softmax(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), 1)
    fresh_bits = answered(base, mixture(base), weights, MANY)
    bank = mixture(base)
    for other in (rows(4), rows(2, 0.0, 1.0, 0.0), rows(1, 0.0, 0.0, 0.0)):
        answered(base, bank, other, MANY)
        answered(base, bank, other)
    assert torch.equal(answered(base, bank, weights, MANY), fresh_bits)


@pytest.mark.parametrize("tokens", [0, MANY])
def test_a_subspace_of_weight_zero_in_every_row_takes_no_part(base: BaseModel, tokens: int) -> None:
    bank, alone = mixture(base), Mixture.of([filled(base, 1)], base.layout, SCALING, base.device, torch.float32)
    found = answered(base, bank, rows(4, 0.0, 1.0, 0.0), tokens)
    assert torch.equal(found, answered(base, alone, rows(4, 1.0), tokens))


def test_a_subspace_of_weight_zero_in_some_rows_stays_for_the_others(base: BaseModel) -> None:
    bank, weights = mixture(base), torch.tensor([[0.0, 1.0, 0.0], [0.4, 0.0, 0.6]])
    with bank.on(base):
        bank.activate(weights)
        x = torch.randn(2, 5, base.layout.modules[0][2])
        both = base.module(base.layout.modules[0][0])(x)
        for row in range(2):
            bank.activate(weights[row : row + 1])
            assert torch.allclose(base.module(base.layout.modules[0][0])(x[row : row + 1]), both[row], atol=1e-6)


@pytest.mark.parametrize("tokens", [0, MANY])
def test_no_weight_at_all_is_the_bare_base(base: BaseModel, tokens: int) -> None:
    assert torch.equal(answered(base, mixture(base), rows(4, 0.0, 0.0, 0.0), tokens), logits(base))


@pytest.mark.parametrize("tokens", [0, MANY])
def test_the_base_is_never_written_and_closes_as_it_was(base: BaseModel, tokens: int) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    plain = logits(base)
    answered(base, mixture(base), rows(4), tokens)
    assert torch.equal(logits(base), plain)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert not any("forward" in vars(base.module(name)) for name, _, _ in base.layout.modules)


def test_a_merge_must_pay_and_fit(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = mixture(base)
    mixed, merged = answered(base, bank, rows(4)), answered(base, bank, rows(4), MANY)
    assert torch.equal(answered(base, bank, rows(4), 10), mixed)
    assert torch.equal(answered(base, bank, rows(4), 2000), merged)
    monkeypatch.setattr("fedstrata.client.mixture.MERGED_BYTES", 1000)
    assert torch.equal(answered(base, bank, rows(4), MANY), mixed)


def test_a_narrow_base_is_mixed_and_not_rounded_into(llava: Path) -> None:
    narrow = BaseModel(ModelSection(name=str(llava), device="cpu", dtype="bfloat16"), LoraSection())
    for dtype in (torch.bfloat16, torch.float32):
        bank = mixture(narrow, dtype=dtype)
        assert torch.equal(answered(narrow, bank, rows(4), MANY), answered(narrow, bank, rows(4)))


@pytest.mark.parametrize("tokens", [0, MANY])
def test_two_mixtures_add_up_and_close_in_turn(base: BaseModel, tokens: int) -> None:
    first, second = mixture(base, 2), mixture(base, 1)
    first.activate(rows(4, 0.5, 0.5), tokens)
    second.activate(rows(4, 1.0), tokens)  # over another adapter nothing is merged: it would be lost
    both = Mixture.of([filled(base, seed) for seed in (0, 1, 0)], base.layout, SCALING, base.device, torch.float32)
    with adapted(base, first), adapted(base, second):
        stacked = logits(base)
    assert error(stacked, answered(base, both, rows(4, 0.5, 0.5, 1.0))) < 1e-5
    assert not any("forward" in vars(base.module(name)) for name, _, _ in base.layout.modules)


def test_gradients_pass_a_frozen_mixture(base: BaseModel) -> None:
    name, _, inner = base.layout.modules[0]
    bank, x = mixture(base), torch.randn(4, 5, inner, requires_grad=True)
    a, b = bank.factors[name]
    alpha = torch.tensor(ALPHA).repeat_interleave(4)
    weight = base.module(name).weight + SCALING * (b * alpha) @ a
    for tokens in (0, MANY):
        with bank.on(base):
            bank.activate(rows(4), tokens)
            (gradient,) = torch.autograd.grad(base.module(name)(x).sum(), x)
        assert torch.allclose(gradient, weight.sum(0).expand_as(x), atol=1e-4)
