"""ModalPrompt: what is sent, what stands before an input, what is trained of it, and a whole run."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message

from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, train
from fedstrata.core import shapes
from fedstrata.core.adapters import Flat, Layout, fresh
from fedstrata.core.config import LoraSection, ModelSection, RunConfig, TrainSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.server.report import write_report
from fedstrata.strategies.base import Inputs, Participant, Setup
from fedstrata.strategies.modalprompt import Guided, ModalPrompt, ModalPromptConfig

OPTIONS = ModalPromptConfig(length=4)
SETTINGS = TrainSection(lr=1e-2, batch_size=2, local_epochs=1, warmup_steps=1)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    torch.set_num_threads(1)
    model = BaseModel(ModelSection(), LoraSection())
    model.model.double()
    model.train_as(OPTIONS)
    return model


def test_its_key_is_as_long_as_text_and_picture_together_on_both_sides(base: BaseModel) -> None:
    (size,) = dict(base.layout.own)["keys"]
    assert size == base.encoder.dim + base.sight + 1
    assert shapes.layout(RunConfig(strategy=OPTIONS)) == base.layout
    text = replace(OPTIONS, token="text")
    assert dict(shapes.layout(RunConfig(strategy=text)).own)["keys"] == (base.encoder.dim,)


SMALL = Layout((), kind="prompts", own=(("prompts", (1, 2)), ("keys", (2,))))


@pytest.fixture
def strategy(setup: Setup) -> ModalPrompt:
    return ModalPrompt(ModalPromptConfig(length=1), replace(setup, layout=SMALL))


def messages(strategy: ModalPrompt, *tasks: int) -> list[Message]:
    strategy.meet([Participant(place + 2, place, tasks=(task,)) for place, task in enumerate(tasks)])
    return list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), None))  # type: ignore[arg-type]


def test_a_task_trains_its_own_group_and_gets_those_of_others_frozen(strategy: ModalPrompt, train_reply: Any) -> None:
    first, second = messages(strategy, 5, 5)
    assert "payload" not in first.content
    assert first.content["arrays"] is second.content["arrays"]
    assert first.content.array_records["arrays"]["flat"].numpy().tolist() == fresh(SMALL, 1, 0, 0).tolist()
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3, 4], 1), train_reply(1, [5, 6, 7, 8], 3)])
    assert [adapter.tolist() for adapter in strategy.knowledge().adapters] == [[4, 5, 6, 7]]
    (message,) = messages(strategy, 2)
    assert message.content.array_records["payload"]["past"].numpy().tolist() == [[4, 5, 6, 7]]
    strategy.aggregate_train(2, [train_reply(0, [9, 9, 0, 1])])
    assert [adapter.tolist() for adapter in strategy.knowledge().adapters] == [[4, 5, 6, 7], [9, 9, 0, 1]]
    (again,) = messages(strategy, 5)  # an old task's own group is trained on, and is not past
    assert again.content.array_records["arrays"]["flat"].numpy().tolist() == [4, 5, 6, 7]
    assert again.content.array_records["payload"]["past"].numpy().tolist() == [[9, 9, 0, 1]]
    assert [strategy.beside(stage, 1) for stage in (1, 2, 4)] == [(0, 0), (0, 4), (0, 12)]
    assert ModalPrompt.uses_task_identity


def test_in_use_an_input_gets_the_nearest_groups_of_all_tasks(strategy: ModalPrompt, train_reply: Any) -> None:
    """Prototypes at 0°, 90° and 180°; top 3 of them, the nearest first by weight."""
    for task, key in enumerate([(1, 0), (0, 1), (-1, 0)]):
        messages(strategy, task)
        strategy.aggregate_train(task + 1, [train_reply(0, [0, 0, *key])])
    router = ModalPrompt.router(strategy.knowledge())
    features = np.array([[-1, 0.1], [0.1, 1]], dtype=np.float32)
    weights = router.weights(Inputs(features, [0, 0], "ab"))
    assert np.allclose(weights, [[1 / 3, 1 / 2, 1], [1 / 2, 1, 1 / 3]])


def examples(count: int, seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    pictures = [Pixels(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) if i % 2 else None for i in range(count)]
    return [Example(str(i), f"how many bars {i}?", ("four", "a red one")[i % 2], p) for i, p in enumerate(pictures)]


def job(base: BaseModel, past: int, client: int = 0, count: int = 4) -> Job:
    groups = [fresh(base.layout, 1, 100 + index) for index in range(past)]
    payload = {"past": np.stack(groups)} if past else {}
    return Job(examples(count, client), fresh(base.layout, 1, client), client, payload=payload)


class Watched(Guided):
    """Keeps by how much batches grew."""

    grown: set[int]

    def batch(self, ctx: Any, batch: Any) -> Any:
        longer = super().batch(ctx, batch)
        self.grown = {longer.mask.shape[1] - batch.mask.shape[1]}
        return longer


@pytest.mark.parametrize(("past", "tokens"), [(0, 4), (1, 8), (2, 12), (5, 12)])
def test_what_stands_before_an_input_does_not_grow_with_the_tasks(base: BaseModel, past: int, tokens: int) -> None:
    half = Watched(OPTIONS)
    train(base, [job(base, past)], SETTINGS, 1.0, half)
    assert half.grown == {tokens}


def trained(base: BaseModel, one: Job, options: ModalPromptConfig, steps: int = 1) -> Flat:
    settings = replace(SETTINGS, local_epochs=steps)
    return train(base, [one], settings, 1.0, Guided(options), dtype=torch.float64)[0].flat


def test_earlier_groups_change_what_is_learned_and_only_the_nearest_ones_do(base: BaseModel) -> None:
    one = job(base, 4, count=1)
    flat = trained(base, one, OPTIONS)
    query = base.encode(one.examples, "both")[0].numpy()
    size = dict(base.layout.own)["keys"][0]
    past = one.payload["past"]
    cosine = past[:, -size:] @ query / np.linalg.norm(past[:, -size:], axis=1)
    near = np.sort(np.argsort(-cosine)[:2])
    assert trained(base, replace(one, payload={"past": past[near]}), OPTIONS).tobytes() == flat.tobytes()
    assert trained(base, replace(one, payload={}), OPTIONS).tobytes() != flat.tobytes()


def test_prototypes_come_nearer_to_their_inputs_and_stay_without_the_term(base: BaseModel) -> None:
    one = job(base, 1)
    query = base.encode(one.examples, "both").numpy()
    size = dict(base.layout.own)["keys"][0]

    def near(flat: Flat) -> float:
        key = flat[-size:]
        return float((query @ key / np.linalg.norm(query, axis=1) / np.linalg.norm(key)).mean())

    assert near(trained(base, one, OPTIONS, 10)) > near(one.flat) + 0.05
    still = trained(base, one, replace(OPTIONS, strength=0.0))
    assert np.array_equal(still[-size:], one.flat[-size:])
    assert not np.array_equal(still[:-size], one.flat[:-size])


def test_a_fused_cohort_gives_every_ragged_client_what_it_gets_alone(base: BaseModel) -> None:
    jobs = [job(base, 3, client, 2 + 3 * client) for client in range(2)]
    together = train(base, jobs, SETTINGS, 1.0, Guided(OPTIONS), dtype=torch.float64)
    for one, fused in zip(jobs, together, strict=True):
        update = np.linalg.norm((alone := trained(base, one, OPTIONS)) - one.flat)
        assert update > 0.1
        assert np.linalg.norm(fused.flat - alone) / update < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "strategy.length: must be at least 1, got 0"),
        ({"past": -1}, "strategy.past: must be at least 0, got -1"),
        ({"strength": float("inf")}, "strategy.strength: must be a finite number of at least 0, got inf"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        ModalPromptConfig(**options)
    assert str(caught.value) == message


def test_a_whole_run_routes_inputs_to_their_tasks_and_has_a_report(federate: Any) -> None:
    """Two tasks whose questions differ: their prototypes tell them apart."""
    run = federate("modalprompt", "train.lr=1e-2")
    assert run.summary["status"] == "completed"
    assert run.summary["routing_accuracy"] > 90
    assert run.summary["bytes_down"] == run.summary["plan"]["bytes_down"]["planned"]
    assert "modalprompt" in write_report(run.folder).read_text(encoding="utf-8")
