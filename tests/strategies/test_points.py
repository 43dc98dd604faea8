"""One stranger's method with something of its own at every extension point of docs/extending.md, in one small run."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from fedstrata.core import shapes
from fedstrata.core.scoring import SCORERS, Share
from fedstrata.server import checkpoint, configure, launch

METHOD = """
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedstrata.core import records
from fedstrata.strategies.base import LocalHalf, Selector
from fedstrata.strategies.finetune import Finetune, FinetuneConfig

asked = []


@dataclass(frozen=True)
class OneLayer(FinetuneConfig):  # AdapterKind
    def trains(self, lora, hidden, features):
        return replace(lora, modules=lora.modules[:1])


class Filled(LocalHalf):  # LocalHalf, Stat
    def on_step(self, ctx, parameters):
        for value in parameters.values():
            value.fill_(0.25)

    def end(self, ctx):
        return {"trained": torch.tensor([[float(len(job.examples))] for job in ctx.jobs])}


class FirstTwo(Selector):  # Selector
    def select(self, offer):
        return offer.rows[:2], {}


class Tenth:  # Router
    needs_features = False

    def weights(self, inputs):
        asked.extend(inputs.ids)
        return np.full((len(inputs.ids), 1), 0.1, dtype=np.float32)


class Mine(Finetune):
    config_type, local_half, selector = OneLayer, Filled, FirstTwo
    averages = False
    trained = 0.0

    def extras(self):
        return {"trained": (1,)}

    def aggregate_train(self, server_round, replies):  # Merge, round: the sum
        came = [records.read_train_reply(message) for message in replies]
        self.trained += sum(float(reply.extra["trained"][0]) for reply in came)
        self.state = replace(self.state, adapter=np.sum([reply.flat for reply in came], axis=0))
        return None, None

    def end_stage(self, stage):  # Merge, stage end
        self.state = replace(self.state, adapter=-self.state.adapter)

    def save(self):
        return replace(super().save(), facts={"trained": self.trained})

    @classmethod
    def mixes(cls, options):
        return True

    @classmethod
    def router(cls, knowledge):
        return Tenth()
"""
SCENARIO = {
    "tasks": {"charts": {"generate": "fcit-mini/charts", "train": 12, "val": 2, "test": 5, "metric": "not_empty"}},
    "stages": [["charts"]],
    "partition": {"kind": "iid"},
    "defaults": {
        "federation": {"clients": 3, "clients_per_round": 3, "rounds_per_stage": 1, "grid": "inprocess"},
        "train": {"local_epochs": 1},
    },
}


def test_a_stranger_brings_an_own_part_at_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(SCORERS, "not_empty", Share(lambda prediction, reference: 1.0))  # type: ignore[arg-type]
    monkeypatch.setattr(launch, "write_report", lambda _: None)
    (tmp_path / "strangers_points.py").write_text(METHOD, encoding="utf-8")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SCENARIO), encoding="utf-8")
    words = ["strategy.name=strangers_points:Mine", "strategy.subspaces=1", f"run.dir={tmp_path / 'run'}"]
    config = configure.resolve(str(tmp_path / "small.yaml"), words)
    run = launch.run(config, Console(quiet=True))
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    parts = checkpoint.require_newest(run).parts
    ((_, out, inner),) = shapes.layout(config).modules
    assert parts.tensors["adapter"].size == config.lora.rank * (out + inner)
    assert summary["last"] == 100  # the scorer's, whatever is answered
    assert parts.facts == {"trained": 6.0}  # three clients, two examples each
    assert np.unique(parts.tensors["adapter"]).tolist() == [-0.75]  # −(3 · 0.25)
    assert len(importlib.import_module("strangers_points").asked) == 2 * 5  # before and after the stage
