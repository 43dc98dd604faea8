"""compat=official on the client: the first step that is lost, and batches that pick their subspace."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedstrata.client.batching import batches
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, train
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.strategies.base import LocalHalf
from fedstrata.strategies.disco import DiscoConfig
from fedstrata.strategies.published import SLOTS, TAU, TOKENS, Published, picked
from tests.client.cohorts import examples

SETTINGS = TrainSection(lr=1e-2, batch_size=2, local_epochs=1, warmup_steps=1)
AXES = np.eye(3, dtype=np.float32)  # tokens of two subspaces; the third axis is like neither


@pytest.fixture(params=["lora", "dora"])
def base(request: pytest.FixtureRequest, llava: Path, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    """An example's feature is the axis that its id says. Both ways of training: a cohort at once, and through PEFT."""
    torch.set_num_threads(1)
    model = BaseModel(ModelSection(name=str(llava)), LoraSection(kind=request.param))
    monkeypatch.setattr(model, "encode", lambda seen, token: torch.from_numpy(AXES[[int(one.id) for one in seen]]))
    return model


def drawn(base: BaseModel, seed: int) -> Flat:
    flat = fresh(base.layout, 2, seed)
    return flat + np.random.default_rng(seed).normal(0, 0.05, flat.shape).astype(np.float32)


def sent(base: BaseModel, axes: Sequence[int], subspace: int, client: int = 0) -> Job:
    """A client whose batches of two are like these axes, one after another."""
    slots = np.stack([drawn(base, slot) for slot in range(3)])
    payload = {SLOTS: slots, TOKENS: AXES[:2], TAU: np.array([0.9], dtype=np.float32)}
    rows, seed = examples(2 * len(axes), seed=client), 7 + client
    for step, places in enumerate(batches(len(rows), SETTINGS, seed)):
        for place in places:
            rows[place] = replace(rows[place], id=str(axes[step]))
    return Job(rows, slots[min(subspace, 2)], seed, {"subspace": subspace}, payload)


def ran(base: BaseModel, *jobs: Job, half: type[LocalHalf] = Published) -> Any:
    return train(base, jobs, SETTINGS, 2.0, half(DiscoConfig(compat="official")))


def test_a_batch_picks_what_is_alike_enough_and_else_the_free_one() -> None:
    means = [[1, 0, 0], [0.6, 0.8, 0], [0.3, 0.2, 0.93]]
    assert picked(means, AXES[:2], 0.9) == [0, 2, 2]
    assert picked(means, AXES[:2], 0.7) == [0, 1, 2]
    assert picked([[1, 0, 0]], AXES[:2], 1.0) == [2]  # above τ, not at it


def test_batches_that_pick_one_subspace_train_it_as_if_it_were_alone(base: BaseModel) -> None:
    (chosen,) = ran(base, sent(base, [1, 1, 1], subspace=1))
    (alone,) = ran(base, replace(sent(base, [1, 1, 1], subspace=1), payload={}))
    assert np.array_equal(chosen.flat, alone.flat)
    assert not np.array_equal(chosen.flat, drawn(base, 1))
    assert np.array_equal(chosen.extra[SLOTS][1], chosen.flat)
    for slot in (0, 2):
        assert np.array_equal(chosen.extra[SLOTS][slot], drawn(base, slot))


def test_an_epoch_may_be_spread_over_several_and_its_clusters_is_uploaded(base: BaseModel) -> None:
    (spread,) = ran(base, sent(base, [0, 1, 0, 2], subspace=1))
    moved = [not np.array_equal(spread.extra[SLOTS][slot], drawn(base, slot)) for slot in range(3)]
    assert moved == [True, True, True]
    assert np.array_equal(spread.flat, spread.extra[SLOTS][1])
    (nowhere,) = ran(base, sent(base, [0, 0, 0], subspace=1))
    assert np.array_equal(nowhere.flat, drawn(base, 1))


def test_the_first_step_is_lost_whatever_it_picks(base: BaseModel) -> None:
    (one,) = ran(base, sent(base, [2], subspace=5))
    assert np.array_equal(one.flat, drawn(base, 2))
    (two,) = ran(base, sent(base, [2, 0], subspace=5))
    assert np.array_equal(two.extra[SLOTS][2], drawn(base, 2))
    assert not np.array_equal(two.extra[SLOTS][0], drawn(base, 0))


def test_clients_of_a_cohort_pick_for_themselves(base: BaseModel) -> None:
    jobs = [sent(base, [1, 0], 1, client=1), sent(base, [0, 1, 1, 2], 0, client=2)]
    for together, job in zip(ran(base, *jobs), jobs, strict=True):
        (alone,) = ran(base, job)
        assert np.allclose(together.extra[SLOTS], alone.extra[SLOTS], atol=1e-6)
        assert np.allclose(together.flat, alone.flat, atol=1e-6)
