"""LwF: nothing to learn at the teacher, which is what the last stage ended with."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message

from fedstrata import scenarios
from fedstrata.client.answers import answer_logits
from fedstrata.client.batching import collate
from fedstrata.client.lora import Cohort, adapted
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, Trained, train
from fedstrata.client.world import base_of, read_config
from fedstrata.core.adapters import Flat, fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.server import checkpoint
from fedstrata.server.runfolder import RunFolder
from fedstrata.strategies.base import Participant, Parts, Setup
from fedstrata.strategies.lwf import Distilled, Lwf, LwfConfig, distance


def test_at_the_teacher_there_is_no_loss_and_no_gradient() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    loss = distance(logits.detach(), logits, 2.0)
    assert loss.tolist() == [0.0] * 5
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.abs().max() < 1e-15


def test_two_answers_of_known_odds() -> None:
    """Logits of odds 4 : 1 against 1 : 4 at T = 2 are odds 2 : 1 against 1 : 2: KL = (2/3 − 1/3) ln 2, times T² = 4."""
    old, new = torch.tensor([[4.0, 1.0]]).double().log(), torch.tensor([[1.0, 4.0]]).double().log().requires_grad_()
    loss = distance(old, new, 2.0)
    assert loss.item() == pytest.approx(4 / 3 * np.log(2), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    assert gradient[0].tolist() == pytest.approx([2 * (1 / 3 - 2 / 3), 2 * (2 / 3 - 1 / 3)], abs=1e-12)  # T (new − old)


def lwf(setup: Setup, **options: Any) -> Lwf:
    return Lwf(LwfConfig(subspaces=1, **options), setup)


def messages(strategy: Lwf, number: int = 1) -> list[Message]:
    strategy.meet([Participant(2, 0), Participant(3, 1)])
    return list(strategy.configure_train(number, ArrayRecord(), ConfigRecord(), None))  # type: ignore[arg-type]


def test_the_teacher_is_what_the_last_stage_ended_with(setup: Setup, train_reply: Any) -> None:
    strategy = lwf(setup)
    assert all("payload" not in message.content for message in messages(strategy))
    strategy.aggregate_train(1, [train_reply(0, [1, 2, 3])])
    strategy.end_stage(1)
    strategy.begin_stage(2)
    strategy.aggregate_train(2, [train_reply(0, [7, 8, 9])])
    one, other = messages(strategy, 3)
    assert one.content["payload"] is other.content["payload"]
    assert one.content.array_records["payload"]["teacher"].numpy().tolist() == [1, 2, 3]
    assert strategy.knowledge().adapters[0].tolist() == [7, 8, 9]
    assert (strategy.beside(1, 2), strategy.beside(2, 1)) == ((0, 0), (0, 3))
    assert strategy.extras() == {}
    again = lwf(setup)
    parts = strategy.save()
    again.load(Parts(dict(parts.tensors), dict(parts.facts)))
    assert messages(again, 3)[0].content.array_records["payload"]["teacher"].numpy().tolist() == [1, 2, 3]
    strategy.end_stage(2)
    assert strategy.state.teacher.tolist() == [7, 8, 9]
    assert not Lwf.uses_task_identity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "strategy.strength: must be a finite number of at least 0, got -1.0"),
        ({"temperature": 0.0}, "strategy.temperature: must be a finite number above 0, got 0.0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        LwfConfig(**options)
    assert str(caught.value) == message


class OnlyDistance(Distilled):
    """The client's own loss left out."""

    def loss(self, ctx: Any, batch: Any, out: Any, base_loss: torch.Tensor) -> torch.Tensor:
        return super().loss(ctx, batch, out, torch.zeros_like(base_loss))


@pytest.mark.parametrize(("kind", "projector"), [("lora", "frozen"), ("lora", "shared"), ("dora", "frozen")])
def test_a_client_that_starts_at_the_teacher_stays_there_and_another_comes_nearer(kind: str, projector: str) -> None:
    """Of the distance alone, with what is adapted in every way: fused, with a projector, and through PEFT."""
    torch.set_num_threads(1)
    base = BaseModel(ModelSection(), LoraSection(kind=kind, rank=2, targets=["q_proj", "down_proj"]), projector)
    base.model.double()
    draw = np.random.default_rng(0)
    pictures = [Pixels(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(4)]
    rows = [Example(str(i), f"how many {i}?", "four", picture) for i, picture in enumerate(pictures)]
    teacher = fresh(base.layout, 2, 0) + draw.normal(0, 0.05, base.layout.size(2)).astype(np.float32)
    start = fresh(base.layout, 2, 1)

    def trained(flat: Flat, steps: int) -> Trained:
        job = Job(rows, flat, 0, payload={"teacher": teacher})
        settings = TrainSection(lr=1e-2, batch_size=4, local_epochs=steps, max_grad_norm=0.0)
        return train(base, [job], settings, 2.0, OnlyDistance(LwfConfig()), dtype=torch.float64)[0]

    there = trained(teacher, 1)  # of a second step Adam would blow up the base's float32 rounding
    assert there.loss == 0
    assert np.abs(there.flat - teacher).max() < 1e-7
    assert trained(trained(start, 6).flat, 1).loss < 0.5 * trained(start, 1).loss


def test_the_answers_of_a_new_stage_move_less_than_finetunes(federate: Any) -> None:
    plain, held = federate("finetune"), federate("lwf", "strategy.strength=50")
    size = plain.parts.tensors["adapter"].nbytes
    assert held.summary["bytes_down"] == plain.summary["bytes_down"] + 2 * 2 * size  # two rounds of stage 2
    assert held.summary["bytes_up"] == plain.summary["bytes_up"]
    commit = checkpoint.stage_start(held.folder / "checkpoints", 2)
    assert commit is not None
    assert moved(commit.parts.tensors["adapter"], held) < 0.5 * moved(commit.parts.tensors["adapter"], plain)


def moved(before: Flat, run: Any) -> float:
    """How far the answers' logits on the second task's questions are from those of the first stage's end."""
    config = read_config(json.dumps(RunFolder(run.folder).config))
    base, task = base_of(config), scenarios.of(config).tasks[1]
    batch = collate(base, [base.prepare(list(task.val[:32]), 512)])
    found = []
    for flat in (before, run.parts.tensors["adapter"]):
        cohort = Cohort.of([flat], base.layout, config.lora.scaling, base.device, torch.float32)
        with torch.no_grad(), adapted(base, cohort):
            found.append(answer_logits(base, batch).softmax(-1))
    return float((found[0] - found[1]).abs().sum(1).mean())
