"""EWC: the penalty's closed form, what is measured when, and how it adds up over clients and stages."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message

from fedstrata.core.errors import BadInput
from fedstrata.server import checkpoint
from fedstrata.strategies.base import Participant, Parts, Setup
from fedstrata.strategies.ewc import Ewc, EwcConfig, quadratic


def test_what_mattered_stays_and_what_did_not_moves() -> None:
    """Old optimum (1, 1) with importances (4, 0), new loss ½ ‖θ + 1‖², λ = 10: θ = ((40 − 1)/41, −1)."""
    theta = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    importance, anchor = torch.tensor([4.0, 0.0]).double(), torch.tensor([1.0, 1.0]).double()
    for _ in range(2000):
        loss = 0.5 * (theta + 1).square().sum() + quadratic(theta, anchor, importance, 10.0).sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            theta -= 0.04 * gradient
    assert theta.tolist()[0] == pytest.approx([39 / 41, -1.0], abs=1e-12)


def messages(strategy: Ewc, number: int) -> list[Message]:
    strategy.meet([Participant(2, 0), Participant(3, 1)])
    return list(strategy.configure_train(number, ArrayRecord(), ConfigRecord(), None))  # type: ignore[arg-type]


def ewc(setup: Setup, **options: Any) -> Ewc:
    return Ewc(EwcConfig(subspaces=1, **options), replace(setup, rounds=2))


def test_importances_are_asked_for_in_the_last_round_of_a_stage_alone(setup: Setup) -> None:
    strategy = ewc(setup)
    asked = []
    for number in range(1, 5):
        measured = {bool(message.content.config_records["config"]["measure"]) for message in messages(strategy, number)}
        asked.append((*measured, dict(strategy.extras())))
    assert asked == [(False, {}), (True, {"importance": (3,)})] * 2


def test_they_are_the_mean_over_all_examples_and_fade_over_stages(setup: Setup, train_reply: Any) -> None:
    strategy = ewc(setup, gamma=0.5)
    assert all("payload" not in message.content for message in messages(strategy, 1))
    strategy.aggregate_train(1, [train_reply(0, [1, 1, 1])])
    messages(strategy, 2)
    replies = [train_reply(0, [1, 2, 0], 1, importance=[4, 0, 1]), train_reply(1, [5, -2, 0], 3, importance=[0, 8, 1])]
    strategy.aggregate_train(2, replies)
    assert strategy.state.importance.tolist() == [1, 6, 1]
    assert strategy.state.anchor.tolist() == strategy.state.adapter.tolist() == [4, -1, 0]
    payload = messages(strategy, 3)[0].content.array_records["payload"]
    assert {name: payload[name].numpy().tolist() for name in payload} == {"importance": [1, 6, 1], "anchor": [4, -1, 0]}
    strategy.aggregate_train(3, [train_reply(0, [9, 9, 9])])
    assert strategy.state.anchor.tolist() == [4, -1, 0]  # within a stage it stays
    messages(strategy, 4)
    strategy.aggregate_train(4, [train_reply(0, [7, 7, 7], 2, importance=[2, 0, 0])])
    assert strategy.state.importance.tolist() == [2.5, 3, 0.5]
    assert strategy.state.anchor.tolist() == [7, 7, 7]


def test_one_client_counts_as_much_as_the_same_data_on_two(setup: Setup, train_reply: Any) -> None:
    whole, halves = ewc(setup), ewc(setup)
    for strategy in (whole, halves):
        messages(strategy, 2)
    whole.aggregate_train(2, [train_reply(0, [1, 1, 1], 4, importance=[2, 3, 0])])
    split = [train_reply(0, [1, 1, 1], 2, importance=[1, 3, 0]), train_reply(1, [1, 1, 1], 2, importance=[3, 3, 0])]
    halves.aggregate_train(2, split)
    assert whole.state.importance.tolist() == halves.state.importance.tolist()


def test_a_mean_of_squares_below_zero_cannot_turn_the_penalty_round(setup: Setup, train_reply: Any) -> None:
    strategy = ewc(setup)
    messages(strategy, 2)
    strategy.aggregate_train(2, [train_reply(0, [1, 1, 1], 1, importance=[-5, 1, 0])])
    assert strategy.state.importance.tolist() == [0, 1, 0]


def test_a_stage_whose_last_round_brings_nothing_is_not_consolidated(setup: Setup) -> None:
    strategy = ewc(setup)
    messages(strategy, 2)
    assert strategy.aggregate_train(2, []) == (None, None)
    assert strategy.state.importance.size == 0


@pytest.mark.parametrize("ended", [False, True])
def test_its_state_survives_save_and_load(setup: Setup, train_reply: Any, ended: bool) -> None:
    strategy, again = ewc(setup), ewc(setup)
    messages(strategy, 2)
    if ended:
        strategy.aggregate_train(2, [train_reply(0, [1, 2, 3], 1, importance=[1, 0, 2])])
    parts = strategy.save()
    again.load(Parts(dict(parts.tensors), dict(parts.facts)))
    kept = again.save().tensors
    assert {n: v.tolist() for n, v in kept.items()} == {n: v.tolist() for n, v in parts.tensors.items()}
    assert ("payload" in messages(again, 3)[0].content) is ended


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "strategy.strength: must be a finite number of at least 0, got -1.0"),
        ({"gamma": 1.5}, "strategy.gamma: must be between 0 and 1, got 1.5"),
        ({"samples": -1}, "strategy.samples: must be at least 0, got -1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        EwcConfig(**options)
    assert str(caught.value) == message


def test_strength_zero_is_finetune_bit_for_bit_and_another_holds_the_adapter(federate: Any) -> None:
    plain, off = federate("finetune"), federate("ewc", "strategy.strength=0")
    assert off.parts.tensors["adapter"].tobytes() == plain.parts.tensors["adapter"].tobytes()
    held = federate("ewc", "strategy.strength=1e8", "strategy.samples=4", "strategy.gamma=0")
    first = checkpointed(held)
    moved = [np.linalg.norm(run.parts.tensors["adapter"] - first) for run in (held, plain)]
    assert moved[0] < moved[1]  # stage 2 moves less from where stage 1 ended
    size = plain.parts.tensors["adapter"].nbytes
    assert (
        held.summary["bytes_up"] == plain.summary["bytes_up"] + 2 * 2 * size
    )  # two clients, the last round of each stage


def checkpointed(run: Any) -> np.ndarray:
    """The adapter behind stage 1."""
    commit = checkpoint.stage_start(run.folder / "checkpoints", 2)
    assert commit is not None
    adapter: np.ndarray = commit.parts.tensors["adapter"]
    return adapter
