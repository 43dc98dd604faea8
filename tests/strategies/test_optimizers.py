"""Server optimisers: first steps by hand, whole sequences against Flower's classes."""

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import strategy as flower

from fedstrata.core import records
from fedstrata.core.errors import BadInput
from fedstrata.server.grids import InProcessGrid
from fedstrata.server.passing import ParticipantsGrid
from fedstrata.strategies.base import Participant, Setup
from fedstrata.strategies.finetune import Finetune, FinetuneConfig
from fedstrata.strategies.merging import MergeConfig
from fedstrata.strategies.optimizers import OPTIMIZERS, Moments, packed, unpacked

DELTA = np.array([0.5, -0.02], dtype=np.float32)
NAMES = {"fedavgm": "FedAvgM", "fedadagrad": "FedAdagrad", "fedadam": "FedAdam", "fedyogi": "FedYogi"}


def moves(name: str, *deltas: np.ndarray, **options: Any) -> tuple[list[np.ndarray], Moments]:
    config, moments, made = MergeConfig(server_optimizer=name, **options), Moments(np.zeros(2, np.float32)), []
    for delta in deltas:
        move, moments = OPTIMIZERS[name](delta, moments, config)
        made.append(move)
    return made, moments


def test_fedavgm_by_hand() -> None:
    (first, second), moments = moves("fedavgm", DELTA, DELTA, server_lr=0.1, server_momentum=0.5)
    assert first == pytest.approx([0.05, -0.002])
    assert second == pytest.approx([0.075, -0.003])  # 0.1 · (0.5 · Δ + Δ)
    assert moments.first == pytest.approx([0.75, -0.03])
    assert (moments.steps, moments.second.size) == (2, 0)


def test_fedadagrad_by_hand() -> None:
    (first, second), moments = moves("fedadagrad", DELTA, DELTA, server_lr=0.1)
    assert first == pytest.approx(0.1 * DELTA / (np.abs(DELTA) + 1e-3))
    assert second == pytest.approx(0.1 * DELTA / (np.sqrt(2) * np.abs(DELTA) + 1e-3))
    assert moments.second == pytest.approx(2 * DELTA**2)


def test_fedadam_by_hand() -> None:
    """v₀ = 0 and an exponent of t + 1, as Flower has it; the paper's own has v₀ = τ² and no correction."""
    ((first,), moments) = moves("fedadam", DELTA, server_lr=0.1)
    rate = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    by_hand = [rate * 0.05 / (np.sqrt(0.01 * 0.25) + 1e-3), rate * -0.002 / (np.sqrt(0.01 * 0.0004) + 1e-3)]
    assert first == pytest.approx(by_hand, rel=1e-5)
    assert moments.second == pytest.approx([0.0025, 4e-6])
    paper = 0.1 * 0.1 * DELTA / (np.sqrt(0.99 * 1e-6 + 0.01 * DELTA**2) + 1e-3)
    assert not np.allclose(first, paper, rtol=0.05)


def test_fedyogi_by_hand() -> None:
    (first, second), moments = moves("fedyogi", DELTA, np.zeros(2, np.float32), server_lr=0.1)
    assert first == pytest.approx([0.1 * 0.05 / 0.051, 0.1 * -0.002 / 0.003], rel=1e-5)
    assert second == pytest.approx([0.1 * 0.045 / 0.051, 0.1 * -0.0018 / 0.003], rel=1e-5)
    assert moments.second == pytest.approx([0.0025, 4e-6])  # Δ = 0 takes nothing from v; Adam's would decay


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_adapter_that_is_trained_in_every_round_moves_as_in_flowers_class(
    setup: Setup, train_reply: Any, name: str
) -> None:
    eta = {"server_learning_rate": 0.3, "server_momentum": 0.8} if name == "fedavgm" else {"eta": 0.3}
    theirs = getattr(flower, NAMES[name])(min_train_nodes=1, min_available_nodes=1, **eta)
    options = FinetuneConfig(subspaces=1, server_optimizer=name, server_lr=0.3, server_momentum=0.8)
    ours, draw = Finetune(options, setup), np.random.default_rng(0)
    ours.meet([Participant(2, 0), Participant(3, 1)])
    grid = InProcessGrid(2, 1, "builtins:object")
    arrays = records.arrays(flat=ours.state.adapter)
    for number in range(1, 5):
        list(theirs.configure_train(number, arrays, ConfigRecord(), ParticipantsGrid(grid, list(grid.roster.values()))))
        replies = [train_reply(k, draw.normal(size=3), k + 1) for k in range(2)]
        ours.aggregate_train(number, replies)
        found, _ = theirs.aggregate_train(number, replies)
        assert isinstance(found, ArrayRecord)
        arrays = records.arrays(flat=found[records.FLAT].numpy().astype(np.float32))
        assert ours.state.adapter == pytest.approx(arrays[records.FLAT].numpy(), rel=1e-5, abs=1e-6)


def test_moments_survive_packing_and_their_absence_too() -> None:
    moments = Moments(np.ones(2, np.float32), np.zeros(0, np.float32), 7)
    back = unpacked(packed(moments, "a."), "a.")
    assert back is not None
    assert (back.first.tolist(), back.second.tolist(), back.steps) == ([1, 1], [], 7)
    assert packed(None) == {}
    assert unpacked(packed(moments, "a."), "b.") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server_optimizer": "adam"}, r"server_optimizer: must be none \| fedavgm .*, got 'adam'"),
        ({"server_lr": 0.0}, "server_lr: must be a finite number above 0, or null, got 0.0"),
        ({"server_momentum": 1.0}, "server_momentum: must be at least 0 and below 1, got 1.0"),
        ({"server_beta1": -0.1}, "server_beta1: must be at least 0 and below 1"),
        ({"server_beta2": 1.0}, "server_beta2: must be at least 0 and below 1"),
        ({"server_tau": 0.0}, "server_tau: must be a finite number above 0"),
        ({"merge": "mode"}, r"merge: must be mean \| median \| .*, got 'mode'"),
        ({"suspects": -1}, "suspects: must be at least 0, got -1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        MergeConfig(**options)
