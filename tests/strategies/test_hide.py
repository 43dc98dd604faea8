"""HiDe-LLaVA: slots apart in the top layer, fused below it, routed by anchors."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedstrata.core.adapters import Layout
from fedstrata.core.errors import BadInput
from fedstrata.core.identity import Token
from fedstrata.strategies.activation import activate
from fedstrata.strategies.base import Inputs, Participant, Setup
from fedstrata.strategies.hide import Hide, HideConfig, decoupled, top_layers

LAYOUT = Layout((("layers.0.up", 3, 4), ("layers.1.up", 3, 4), ("layers.2.down", 2, 3), ("layers.2.up", 3, 4)))
TOP = frozenset({"layers.2.down", "layers.2.up"})
FUSIONS = ["factor", "delta"]


def slots(number: int, rank: int = 2) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.normal(size=LAYOUT.size(rank)).astype(np.float32) for _ in range(number)]


def deltas(flat: np.ndarray) -> dict[str, np.ndarray]:
    return {name: b @ a for name, (a, b) in LAYOUT.split(flat).items()}


# what is expanded, what is fused


def test_the_last_decoder_layers_are_expanded_and_the_vision_towers_never() -> None:
    deep = Layout(
        (
            ("model.language_model.layers.10.mlp.up_proj", 3, 4),
            ("model.language_model.layers.9.mlp.up_proj", 3, 4),
            ("model.vision_tower.encoder.layers.23.q_proj", 3, 4),
            ("multi_modal_projector.linear_1", 3, 4),
        )
    )
    assert top_layers(deep, 1) == {"model.language_model.layers.10.mlp.up_proj"}
    assert len(top_layers(deep, 2)) == len(top_layers(deep, 5)) == 2
    assert top_layers(LAYOUT, 1) == TOP


def test_a_layout_without_decoder_layers_is_bad_input() -> None:
    with pytest.raises(
        BadInput, match=r"lora\.targets: must name some in the language model's decoder layers, .*, got x"
    ):
        top_layers(Layout((("x", 1, 2),)), 1)


@pytest.mark.parametrize("fuse", FUSIONS)
def test_one_task_is_fused_into_itself(fuse: str) -> None:
    (slot,) = slots(1)
    (one,) = decoupled([slot], LAYOUT, TOP, fuse)
    assert one.tobytes() == slot.tobytes()
    assert decoupled([], LAYOUT, TOP, fuse) == ()


def test_fusing_factors_adds_cross_products_and_fusing_deltas_does_not() -> None:
    own, views = [deltas(slot) for slot in slots(3)], [LAYOUT.split(slot) for slot in slots(3)]
    factor, delta = (deltas(decoupled(slots(3), LAYOUT, TOP, fuse)[0]) for fuse in FUSIONS)
    for name in ("layers.0.up", "layers.1.up"):
        product = sum(view[name][1] for view in views) @ sum(view[name][0] for view in views)
        assert np.allclose(factor[name], product, atol=1e-5)
        assert np.allclose(delta[name], sum(each[name] for each in own), atol=1e-5)
        assert np.linalg.norm(factor[name] - delta[name]) > 1


@pytest.mark.parametrize("fuse", FUSIONS)
def test_with_the_true_task_the_top_layers_answer_as_its_slot_alone(fuse: str) -> None:
    adapters = decoupled(slots(3), LAYOUT, TOP, fuse)
    for slot, adapter in zip(slots(3), adapters, strict=True):
        for name in TOP:
            assert np.allclose(deltas(adapter)[name], deltas(slot)[name], atol=1e-6)


@pytest.mark.parametrize("fuse", FUSIONS)
def test_whatever_the_input_all_other_layers_answer_the_same(fuse: str) -> None:
    """Every adapter has the same bytes there, so any weights of sum 1 give the same but for rounding."""
    adapters = decoupled(slots(3), LAYOUT, TOP, fuse)
    weights = activate(np.random.default_rng(1).normal(size=(5, 3)), np.eye(3, dtype=np.float32), 0.1)
    assert len({row.tobytes() for row in weights}) == 5
    for name in ("layers.0.up", "layers.1.up"):
        assert len({b"".join(part.tobytes() for part in LAYOUT.split(flat)[name]) for flat in adapters}) == 1
        answers = [sum(w * deltas(flat)[name] for w, flat in zip(row, adapters, strict=True)) for row in weights]
        assert np.allclose(answers, answers[0], rtol=1e-6, atol=1e-6)
    top = [sum(w * deltas(flat)["layers.2.up"] for w, flat in zip(row, adapters, strict=True)) for row in weights]
    assert not np.allclose(top, top[0], atol=1e-1)


# the method


@pytest.fixture
def strategy(setup: Setup) -> Hide:
    return Hide(HideConfig(), replace(setup, layout=Layout((("layers.0.up", 1, 2), ("layers.1.up", 1, 2)))))


def told(partition: int, task: int, token: list[float], count: int = 10) -> Participant:
    return Participant(partition + 2, partition, Token(np.array(token, np.float32), count), (task,))


def test_a_task_has_one_slot_whoever_trains_it_and_whatever_its_tokens(
    strategy: Hide, train_reply: Any, sent: Any
) -> None:
    strategy.meet([told(0, 5, [1, 0]), told(1, 2, [1, 0]), told(2, 5, [0, 1])])
    assert {partition: slot for partition, (slot, _) in sent(strategy).items()} == {0: 0, 1: 1, 2: 0}
    strategy.aggregate_train(1, [train_reply(p, [p] * 6) for p in range(3)])
    assert [subspace.adapter.tolist() for subspace in strategy.state.subspaces] == [[1] * 6, [1] * 6]


def test_an_anchor_is_the_mean_over_all_instructions_of_the_task(strategy: Hide, train_reply: Any) -> None:
    strategy.meet([told(0, 0, [1, 0], 30), told(1, 0, [0, 1], 10)])
    strategy.aggregate_train(1, [train_reply(0, [1] * 6, 30), train_reply(1, [1] * 6, 10)])
    assert strategy.knowledge().tokens.tolist() == [[0.75, 0.25]]


def test_an_input_like_an_anchor_goes_to_its_slot_and_a_low_temperature_routes_hard(
    strategy: Hide, train_reply: Any
) -> None:
    tokens = [[1.0, 0.0, 0.2], [0.3, 1.0, 0.0], [0.0, 0.4, 1.0]]
    strategy.meet([told(p, p, token) for p, token in enumerate(tokens)])
    strategy.aggregate_train(1, [train_reply(p, [p] * 6) for p in range(3)])
    known = strategy.knowledge()
    inputs = Inputs(np.array(tokens, np.float32), [0, 0, 0], ["a", "b", "c"])
    weights = Hide.router(known).weights(inputs)
    assert weights.argmax(axis=1).tolist() == [0, 1, 2]
    assert weights.max() < 1
    hard = Hide.router(replace(known, options={**known.options, "epsilon": 1e-4})).weights(inputs)
    assert hard.tolist() == np.eye(3).tolist()


def test_a_shared_projector_is_everybodys_and_no_slot_has_it(setup: Setup, train_reply: Any) -> None:
    layout = Layout((("layers.0.up", 1, 2), ("layers.1.up", 1, 2)), (("projector.weight", (2,)),))
    strategy = Hide(HideConfig(projector="shared"), replace(setup, layout=layout))
    strategy.meet([told(0, 0, [1, 0]), told(1, 1, [0, 1])])
    strategy.aggregate_train(1, [train_reply(0, [1] * 6 + [2, 4]), train_reply(1, [3] * 6 + [6, 8])])
    known = strategy.knowledge()
    assert known.shared.tolist() == [4, 6]
    assert [adapter.tolist() for adapter in known.adapters] == [[4, 4, 4, 1, 1, 1], [4, 4, 4, 3, 3, 3]]


def test_it_says_that_training_is_told_the_task() -> None:
    assert Hide.uses_task_identity
    assert Hide.needs_tokens
    assert Hide.mixes(HideConfig(activation="argmax"))


def test_ranks_are_planned_as_they_come(strategy: Hide, setup: Setup, train_reply: Any) -> None:
    delta = Hide(HideConfig(fuse="delta"), strategy.setup)
    for one in (strategy, delta):
        one.meet([told(0, 0, [1, 0]), told(1, 1, [0, 1])])
        one.aggregate_train(1, [train_reply(p, [1, 2, 3, 4, 5, 6 + p]) for p in range(2)])
        ranks = {strategy.setup.layout.rank(adapter) for adapter in one.knowledge().adapters}
        assert ranks == {one.rank_after(2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fuse": "mean"}, "strategy.fuse: must be factor | delta, got 'mean'"),
        ({"projector": "per-subspace"}, "strategy.projector: must be frozen or shared, got 'per-subspace'"),
        ({"expand": 0}, "strategy.expand: must be at least 1, got 0"),
        (
            {"activation": "concat"},
            "strategy.activation: must be softmax or argmax, whose weights add up to 1, got 'concat'",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        HideConfig(**options)
    assert str(caught.value) == message


def test_a_whole_run_routes_its_tasks_and_moves_the_bytes_that_were_planned(federate: Any) -> None:
    ran = federate("hide", "strategy.fuse=delta", "evaluate.shard=10")
    assert ran.summary["routing_accuracy"] >= 90
    for what in ("bytes_up", "bytes_down", "bytes_eval"):
        assert ran.summary["plan"][what]["planned"] == ran.summary[what], what
