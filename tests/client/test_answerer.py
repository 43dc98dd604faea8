"""Answering shards: one bank for all of them, batches of like lengths, and the same answers however they are asked."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedstrata.client import banks, generation
from fedstrata.client.banks import bank_of
from fedstrata.client.evaluation import Answerer
from fedstrata.client.generation import generate, grouped
from fedstrata.client.mixture import Mixture
from fedstrata.client.model import BaseModel
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import LoraSection, ModelSection
from fedstrata.core.records import Knowledge
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.strategies.base import Everything, Inputs, Weights

SCALING = 2.0


@dataclass(frozen=True)
class Given:
    """A router that was told every example's weights, by its id."""

    table: dict[str, tuple[float, ...]]
    needs_features: bool = False

    def weights(self, inputs: Inputs) -> Weights:
        return np.array([self.table[name] for name in inputs.ids], dtype=np.float32)


@pytest.fixture(scope="module")
def base(llava: Path) -> BaseModel:
    torch.set_num_threads(1)
    return BaseModel(ModelSection(name=str(llava), device="cpu", max_new_tokens=6), LoraSection())


@pytest.fixture(autouse=True)
def _no_bank_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banks, "_BANKS", [])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many subspaces each mixture had that was made."""
    sizes: list[int] = []
    of = Mixture.of

    def counted(flats: tuple[Flat, ...], *rest: object) -> Mixture:
        sizes.append(len(flats))
        return of(flats, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Mixture, "of", staticmethod(counted))
    return iter([sizes])  # type: ignore[return-value]


def known(base: BaseModel, *seeds: int) -> Knowledge:
    """Subspaces whose B is not zero."""
    flats = [fresh(base.layout, 4, seed) for seed in seeds]
    draws = [np.random.default_rng(seed).normal(0, 0.08, flat.shape) for seed, flat in zip(seeds, flats, strict=True)]
    return Knowledge(tuple(np.asarray(f + d, dtype=np.float32) for f, d in zip(flats, draws, strict=True)))


def asked(count: int, pictures: bool = True) -> list[Example]:
    """Questions of very different lengths, long ones and short ones in turn."""
    draw = np.random.default_rng(0)
    found = []
    for index in range(count):
        question = f"what colour is shape {index}?" + " and the next one?" * (index % 3 * 4)
        picture = Pixels(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) if pictures and index % 2 else None
        found.append(Example(str(index), question, "red", picture))
    return found


def routed(rows: list[Example], subspaces: int) -> Given:
    scores = np.exp(np.random.default_rng(1).normal(0, 1, (len(rows), subspaces)))
    weights = scores / scores.sum(axis=1, keepdims=True)
    return Given({row.id: tuple(weight) for row, weight in zip(rows, weights.tolist(), strict=True)})


def test_answers_come_in_the_order_of_the_examples_whatever_the_batches(base: BaseModel) -> None:
    rows = asked(7)
    answerer = Answerer(base, known(base, 0, 1, 2), routed(rows, 3), SCALING)
    alone = [answerer.answer([row], 0, 1, 512).texts[0] for row in rows]
    assert len(set(alone)) > 3
    for size in (2, 3, 7, 50):
        assert list(answerer.answer(rows, 0, size, 512).texts) == alone


def test_merged_answers_are_the_mixed_ones(base: BaseModel) -> None:
    rows = asked(6)
    answerer = Answerer(base, known(base, 0, 1), Given({row.id: (0.3, 0.7) for row in rows}), SCALING)
    merged = answerer.answer(rows, 0, 3, 512).texts
    bank = answerer.bank
    assert isinstance(bank, Mixture)
    assert bank._merged
    with bank.on(base):
        bank.activate(torch.tensor([[0.3, 0.7]]))
        assert list(merged) == [generate(base, [row], 512)[0] for row in rows]
    assert list(merged) != generate(base, rows, 512)


def test_merging_is_decided_by_the_whole_shard_and_not_by_its_batches(base: BaseModel) -> None:
    rows = asked(12, pictures=False)
    shared, apart = Given({row.id: (0.3, 0.7) for row in rows}), routed(rows, 2)
    for router, merged in ((shared, True), (apart, False)):
        answerer = Answerer(base, known(base, 0, 1), router, SCALING)
        bank = answerer.bank
        assert isinstance(bank, Mixture)
        answerer.answer(rows, 0, 1, 512)  # a batch alone is too small to pay for a merge
        assert bool(bank._merged) == merged
        banks._BANKS.clear()


def test_one_bank_serves_all_shards_of_an_evaluation(base: BaseModel, made: Iterator[list[int]]) -> None:
    rows, sizes = asked(4), next(made)
    for start in (0, 2):  # each message brings its own copy of the knowledge
        Answerer(base, known(base, 0, 1), Everything(2), SCALING).answer(rows[start : start + 2], 0, 2, 512)
    assert sizes == [2]
    Answerer(base, known(base, 0, 2), Everything(2), SCALING)
    Answerer(base, known(base, 0, 2), Everything(2), 2 * SCALING)
    assert sizes == [2, 2, 2]
    assert len(banks._BANKS) == 1


def test_a_bank_is_of_one_base(base: BaseModel, llava: Path) -> None:
    other = BaseModel(ModelSection(name=str(llava), device="cpu"), LoraSection())
    first = bank_of(base, known(base, 0), SCALING)
    assert bank_of(base, known(base, 0), SCALING) is first
    assert bank_of(other, known(base, 0), SCALING) is not first


def test_answers_do_not_depend_on_which_shards_came_before(base: BaseModel) -> None:
    """An actor sees shards in any order; what it has merged or left out before must not show."""
    rows, knowledge = asked(9), known(base, 0, 1)
    table = {row.id: (1.0, 0.0) if index < 3 else (0.2, 0.8) for index, row in enumerate(rows)}
    table |= {row.id: (0.1 * index, 1 - 0.1 * index) for index, row in enumerate(rows) if index >= 6}
    shards = [rows[:3], rows[3:6], rows[6:]]
    bits = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        banks._BANKS.clear()
        found = {}
        for index in order:
            answerer = Answerer(base, knowledge, Given(table), SCALING)
            bank = answerer.bank
            assert isinstance(bank, Mixture)
            answerer.answer(shards[index], 0, 2, 512)
            with bank.on(base):
                bank.activate(torch.from_numpy(answerer.weigh(shards[index], 0)), 200)
                x = torch.linspace(-1, 1, 3 * 5 * base.layout.modules[0][2]).view(3, 5, -1)
                found[index] = base.module(base.layout.modules[0][0])(x).clone()
        bits.append(found)
    for found in bits[1:]:
        assert all(torch.equal(found[index], bits[0][index]) for index in found)


def test_no_knowledge_is_the_bare_base(base: BaseModel) -> None:
    rows = asked(3)
    answers = Answerer(base, Knowledge(()), Everything(0), SCALING).answer(rows, 0, 3, 512)
    assert list(answers.texts) == generate(base, rows, 512)
    assert answers.weights.shape == (3, 0)
    assert Answerer(base, Knowledge(()), Everything(0), SCALING).answer([], 0, 3, 512).texts == ()


def test_one_subspace_is_one_adapter(base: BaseModel) -> None:
    rows = asked(3)
    one = Answerer(base, known(base, 5), Everything(1), SCALING).answer(rows, 0, 3, 512).texts
    two = Answerer(base, known(base, 5, 6), Given({row.id: (1.0, 0.0) for row in rows}), SCALING)
    assert one == two.answer(rows, 0, 3, 512).texts


def test_the_base_is_bitwise_as_before_after_answering(base: BaseModel) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    rows = asked(6)
    for router in (Everything(2), routed(rows, 2)):
        Answerer(base, known(base, 0, 1), router, SCALING).answer(rows, 0, 4, 512)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_weights_are_found_once_per_example_and_not_per_token(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    activate = Mixture.activate
    rows = asked(6)
    answerer = Answerer(base, known(base, 0, 1), routed(rows, 2), SCALING)

    def counted(bank: Mixture, weights: torch.Tensor, tokens: int = 0) -> None:
        calls.append(len(weights))
        activate(bank, weights, tokens)

    monkeypatch.setattr(Mixture, "activate", counted)
    answerer.answer(rows, 0, 4, 512)
    assert calls == [4, 2]


def test_the_factors_are_of_the_type_that_the_base_computes_in(base: BaseModel, llava: Path) -> None:
    narrow = BaseModel(ModelSection(name=str(llava), device="cpu", dtype="bfloat16"), LoraSection())
    for model, dtype in ((base, torch.float32), (narrow, torch.bfloat16)):
        bank = bank_of(model, known(base, 0), SCALING)
        assert isinstance(bank, Mixture)
        assert {factor.dtype for pair in bank.factors.values() for factor in pair} == {dtype}


def test_batches_hold_questions_of_like_length() -> None:
    assert grouped([9, 2, 8, 3, 9], 2) == [[1, 3], [2, 0], [4]]
    assert grouped([9, 2, 8], 3) == [[0, 1, 2]]  # one batch: nothing is gained by another order
    assert grouped([5, 5, 5], 2) == [[0, 1], [2]]
    assert grouped([], 2) == []


def test_fewer_padded_tokens_pass_than_in_the_order_given(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, shapes = asked(9, pictures=False), []
    greedy = generation.greedy

    def counted(model: BaseModel, batch: list[generation.Prepared]) -> torch.Tensor:
        shapes.append(len(batch) * max(len(row.prompt) for row in batch))
        return greedy(model, batch)

    monkeypatch.setattr("fedstrata.client.evaluation.greedy", counted)
    answerer = Answerer(base, Knowledge(()), Everything(0), SCALING)
    answerer.answer(rows, 0, 3, 512)
    lengths = [len(row.prompt) for row in base.tokenise(rows, 512)]
    given = sum(3 * max(lengths[start : start + 3]) for start in (0, 3, 6))
    assert sum(shapes) < 0.8 * given


def test_a_question_that_is_cut_does_not_depend_on_its_answer(base: BaseModel) -> None:
    long = replace(asked(1)[0], question="word " * 60, image=None)
    answerer = Answerer(base, Knowledge(()), Everything(0), SCALING)
    texts = [answerer.answer([replace(long, answer=a)], 0, 1, 40, "cut").texts for a in ("red", "red " * 10)]
    assert texts[0] == texts[1]
