"""What a plug-in tries to take out of a client: text or a picture, in every dress that a tensor allows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from fedstrata.core.errors import BadInput, FedstrataError
from fedstrata.server import checkpoint, configure, launch

SCENARIO = {
    "tasks": {"charts": {"generate": "fcit-mini/charts", "train": 12, "val": 2, "test": 2}},
    "stages": [["charts"]],
    "partition": {"kind": "dirichlet", "beta": 1.0, "min_size": 3},
    "defaults": {
        "federation": {"clients": 2, "clients_per_round": 2, "rounds_per_stage": 1, "grid": "inprocess"},
        "evaluate": {"split": "val"},
    },
}
SPY = """
import numpy as np
import torch

from fedstrata.strategies.base import LocalHalf
from fedstrata.strategies.finetune import Finetune


def texts(ctx):
    return [job.examples[0].question[:32].ljust(32) for job in ctx.jobs]


def pictures(ctx):
    return torch.stack([torch.from_numpy(np.array(job.examples[0].image.open())) for job in ctx.jobs])


class Text(LocalHalf):
    def end(self, ctx):
        return {"statistics": texts(ctx)}


class TextAsNumbers(LocalHalf):
    def end(self, ctx):
        return {"statistics": torch.tensor([list(text.encode()) for text in texts(ctx)], dtype=torch.float32)}


class Picture(LocalHalf):
    def end(self, ctx):
        return {"statistics": pictures(ctx)}


class PictureForAnother(LocalHalf):
    def end(self, ctx):
        return {"statistics": pictures(ctx).float()}


class Spy(Finetune):
    pass


class Liar(Finetune):
    def extras(self):
        return {"statistics": (3,)}


def spy(half, kind=Spy):
    return type(half.__name__ + "Spy", (kind,), {"local_half": half})


TextSpy, TextAsNumbersSpy, PictureSpy = spy(Text), spy(TextAsNumbers), spy(Picture)
PictureForAnotherSpy = spy(PictureForAnother, Liar)
"""


@pytest.fixture
def try_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A plug-in's run folder."""

    def run(name: str) -> Path:
        torch.set_num_threads(1)
        (tmp_path / "strangers_spy.py").write_text(SPY, encoding="utf-8")
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(SCENARIO), encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(launch, "write_report", lambda _: None)
        words = [f"strategy.name=strangers_spy:{name}", f"run.dir={tmp_path / 'run'}"]
        return launch.run(configure.resolve(str(tmp_path / "small.yaml"), words), Console(quiet=True))

    return run


@pytest.mark.parametrize(("name", "came"), [("TextSpy", "list"), ("PictureSpy", "torch.uint8")])
def test_what_is_no_number_does_not_leave_the_client(try_it: Callable[[str], Path], name: str, came: str) -> None:
    with pytest.raises(BadInput, match=rf"LocalHalf\.end: statistics: must be real numbers of each of .* got '{came}"):
        try_it(name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("TextAsNumbersSpy", "records: must be"),  # nothing of that name was declared
        ("PictureForAnotherSpy", "array: must be float32 (3,), got float32 (32, 32, 3)"),  # another shape was declared
    ],
)
def test_numbers_that_were_not_declared_are_refused_by_name_and_not_kept(
    try_it: Callable[[str], Path], tmp_path: Path, name: str, why: str
) -> None:
    with pytest.raises(FedstrataError, match="1 of 1 rounds were skipped"):
        try_it(name)
    run = tmp_path / "run"
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = [event for event in map(json.loads, lines) if event["event"] == "rejected"]
    assert len(rejected) == 2
    assert all(why in event["reason"] for event in rejected)
    assert list(checkpoint.require_newest(run).parts.tensors) == ["adapter"]
