"""Whole runs with other kinds of adapters: they learn, resume to the same bits, and their exports load in PEFT."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console

from fedstrata.client.banks import bank_of
from fedstrata.client.model import BaseModel
from fedstrata.core.config import LoraSection, ModelSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example, Pixels
from fedstrata.server import checkpoint, configure, launch
from fedstrata.server.export import export, read_knowledge
from fedstrata.server.federation import Federation

QUIET = Console(quiet=True)
WORDS = ["federation.grid=inprocess", "evaluate.split=val", "train.local_epochs=1", "train.batch_size=8", "lora.rank=2"]
DRAWN = {"train": 60, "val": 10, "test": 10}


def config(folder: Path, kind: str, *words: str) -> Any:
    """fcit-mini-short, shrunken: two stages of two rounds, in each two of three clients with about 20 rows."""
    tree = {
        "tasks": {name: {"generate": f"fcit-mini/{name}", **DRAWN} for name in ("names", "charts")},
        "stages": [["names"], ["charts"]],
        "partition": {"kind": "dirichlet", "beta": 2.0, "min_size": 5},
        "defaults": {"federation": {"clients": 3, "clients_per_round": 2, "rounds_per_stage": 2}},
    }
    scenario = folder.with_suffix(".yaml")
    scenario.write_text(yaml.safe_dump(tree, sort_keys=False))
    lr = "train.lr=3e-2" if kind == "ia3" else "train.lr=3e-3"
    return configure.resolve(str(scenario), [*WORDS, lr, f"run.dir={folder}", f"lora.kind={kind}", *words])


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def first_losses(folder: Path) -> list[float]:
    """The mean loss of each round of stage 1."""
    rounds = [event for event in events(folder) if event["event"] == "round" and event["stage"] == 1]
    return [float(np.mean([one["loss"] for one in event["participants"]])) for event in rounds]


def check_export(run: Path, to: Path, kind: str) -> None:
    """Every exported folder gives in PEFT what its subspace gives here."""
    names = export(run, to)
    says = json.loads((to / "router.json").read_text())
    _, knowledge, _ = read_knowledge(run)
    assert says["kind"] == kind
    assert len(names) == len(knowledge.adapters)
    base = BaseModel(ModelSection(), LoraSection(kind=kind, rank=2))
    draw = np.random.default_rng(0)
    picture = Pixels(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    (prepared,) = base.prepare([Example("q", "Which digit is drawn here?", "", picture)], 512)
    with torch.no_grad():
        batch = base.embed([prepared.prompt], [prepared.features], left=True)
        inputs = {"inputs_embeds": batch.embeds, "attention_mask": batch.mask}
        plain = base.model(**inputs).logits
        bank = bank_of(base, knowledge, says["scaling"])
        assert bank is not None
        for index, name in enumerate(names):
            with bank.on(base):
                bank.activate(torch.eye(len(names))[index : index + 1])
                ours = base.model(**inputs).logits
            fresh = BaseModel(ModelSection(), LoraSection())
            theirs = PeftModel.from_pretrained(fresh.model, str(to / name))(**inputs).logits
            assert torch.allclose(theirs, ours, atol=1e-4)
            assert not torch.allclose(theirs, plain, atol=1e-2)


@pytest.mark.parametrize("kind", ["rslora", "dora", "ia3"])
def test_finetune_learns_resumes_to_the_same_bits_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    chosen = ["strategy.name=finetune"]
    whole = launch.run(config(tmp_path / "whole", kind, *chosen), QUIET)
    assert summary(whole)["status"] == "completed"
    assert first_losses(whole)[1] < first_losses(whole)[0]
    told = [event["reason"] for event in events(whole) if event["event"] == "one_client_at_a_time"]
    assert told == ([] if kind == "rslora" else [f"lora.kind={kind} cannot be fused"])
    real = Federation._round

    def stop(self: Federation, stage: int, round_: int) -> None:
        if (stage, round_) == (2, 1):
            raise KeyboardInterrupt
        real(self, stage, round_)

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_round", stop)
        with pytest.raises(BaseException, match="interrupted"):
            launch.run(config(tmp_path / "cut", kind, *chosen), QUIET)
    resumed = launch.resume(tmp_path / "cut", QUIET)
    assert summary(resumed)["final_state_sha256"] == summary(whole)["final_state_sha256"]
    check_export(whole, tmp_path / "out", kind)


def test_disco_routes_dora_by_argmax_and_mixes_none(tmp_path: Path) -> None:
    for strategy in ([], ["strategy.activation=cosine"], ["strategy.activation=concat"]):
        with pytest.raises(BadInput, match=r"lora\.kind: .*got 'dora' .*strategy\.activation=argmax works"):
            launch.run(config(tmp_path / "refused", "dora", *strategy), QUIET)
        assert not (tmp_path / "refused").exists()
    run = launch.run(config(tmp_path / "run", "dora", "strategy.activation=argmax"), QUIET)
    assert summary(run)["status"] == "completed"
    assert summary(run)["subspaces"] == 2
    commit = checkpoint.require_newest(run)
    assert {len(value) for name, value in commit.parts.tensors.items() if name.endswith("adapter")} == {
        read_knowledge(run)[1].adapters[0].size
    }
    check_export(run, tmp_path / "out", "dora")


@pytest.mark.parametrize("strategy", ["oracle", "random-route"])
def test_controls_route_every_input_to_one_adapter_so_any_kind_will_do(tmp_path: Path, strategy: str) -> None:
    words = [f"strategy.name={strategy}", "federation.rounds_per_stage=1"]
    run = launch.run(config(tmp_path / "run", "ia3", *words), QUIET)
    assert summary(run)["status"] == "completed"


def test_the_console_says_once_why_clients_are_trained_one_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["strategy.name=finetune", "federation.rounds_per_stage=1", "federation.cohort_size=2"]
    launch.run(config(tmp_path / "two", "dora", *words), Console(width=200))
    line = "cohorts: one client at a time, because lora.kind=dora cannot be fused"
    assert capsys.readouterr().out.count(line) == 1
    one = launch.run(config(tmp_path / "one", "dora", *words[:2], "federation.cohort_size=1"), QUIET)
    assert summary(one)["final_state_sha256"] == summary(tmp_path / "two")["final_state_sha256"]


@pytest.mark.parametrize("strategy", ["fedprox", "scaffold", "ewc"])
def test_methods_that_hook_into_training_take_any_kind(tmp_path: Path, strategy: str) -> None:
    words = [f"strategy.name={strategy}", "federation.rounds_per_stage=1", "strategy.projector=shared"]
    run = launch.run(config(tmp_path / "run", "dora", *words), QUIET)
    assert summary(run)["status"] == "completed"
    assert summary(run)["rejected"] == {}


def test_a_method_that_adds_adapters_up_refuses_kinds_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"lora\.kind: must be lora or rslora .*got 'ia3' with strategy\.name=olora"):
        launch.run(config(tmp_path / "run", "ia3", "strategy.name=olora"), QUIET)
