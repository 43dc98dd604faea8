"""A federation small enough for hand calculation: one layer, rank 1, three parameters an adapter."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from rich.console import Console

from fedstrata.core import records
from fedstrata.core.adapters import Layout
from fedstrata.core.records import Binding, TrainReply
from fedstrata.server import checkpoint, configure, launch
from fedstrata.server.flower_private import become_server
from fedstrata.strategies.base import Parts, Setup, Strategy

MakeReply = Callable[..., Message]


@dataclass(frozen=True)
class Ran:
    """What a run came to."""

    parts: Parts
    summary: Mapping[str, Any]
    folder: Path


LAYOUT = Layout((("layer", 1, 2),))


@pytest.fixture(autouse=True)
def _server() -> None:
    become_server()


@pytest.fixture
def setup() -> Setup:
    """K = 3 tasks, τ = 0.9, ε = 0.05."""
    return Setup(seed=0, layout=LAYOUT, rank=1, subspaces=3, tau=0.9, epsilon=0.05)


@pytest.fixture
def train_reply() -> MakeReply:
    """A client's train reply; its node is its partition + 2."""

    def make(
        partition: int, values: Sequence[float], count: int = 10, loss: float = 1.0, **extra: Sequence[float]
    ) -> Message:
        request = Message(RecordDict(), partition + 2, records.TRAIN)
        flat, beside = np.array(values, dtype=np.float32), {n: np.array(v, dtype=np.float32) for n, v in extra.items()}
        reply = TrainReply(Binding("", 1, 1, partition), flat, count, loss, 3, 0.1, extra=beside)
        return records.train_reply(reply, request)

    return make


@pytest.fixture
def sent() -> Callable[[Strategy], dict[int, tuple[int, list[float]]]]:
    """What a strategy sends in a round: partition → (subspace, adapter)."""

    def configure(strategy: Strategy, number: int = 1) -> dict[int, tuple[int, list[float]]]:
        messages = strategy.configure_train(number, ArrayRecord(), ConfigRecord(), None)  # type: ignore[arg-type]
        return {
            message.metadata.dst_node_id - 2: (
                int(message.content.config_records["config"]["subspace"]),  # type: ignore[arg-type]
                message.content.array_records["arrays"]["flat"].numpy().tolist(),
            )
            for message in messages
        }

    return configure


@pytest.fixture(scope="session")
def federate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran]:
    """A whole run of fcit-mini-short, shrunk to one epoch a round: its strategy's final state and its summary.

    Equal runs are run once, without a report; their folders are read only.
    """
    return cache(lambda name, *words: short_run(tmp_path_factory.mktemp("short") / "run", name, *words))


@pytest.fixture(scope="session")
def short(federate: Callable[..., Ran]) -> Callable[[str], Ran]:
    """The same with two epochs, scored on the test split."""
    return lambda name: federate(name, "train.local_epochs=2", "evaluate.split=test")


def short_run(folder: Path, name: str, *words: str) -> Ran:
    torch.set_num_threads(1)
    small = ["federation.grid=inprocess", "train.local_epochs=1", "train.lr=1e-3", "evaluate.split=val"]
    config = configure.resolve("fcit-mini-short", [*small, f"strategy.name={name}", f"run.dir={folder}", *words])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "write_report", lambda _: None)
        launch.run(config, Console(quiet=True))
    summary = json.loads((folder / "summary.json").read_text())
    return Ran(checkpoint.require_newest(folder).parts, summary, folder)
