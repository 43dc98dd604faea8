"""The default grid end to end: Ray actors, as many as you like, and the same bits."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedstrata.client.model import TINY
from fedstrata.core.errors import BadInput
from fedstrata.server import configure, launch, raygrid

WORDS = ("federation.rounds_per_stage=1", "federation.clients_per_round=3", "train.local_epochs=1", "evaluate.shard=25")


@pytest.fixture(scope="module", autouse=True)
def _one_ray() -> Iterator[None]:
    """One Ray for all runs of this module: each would take seconds to start its own."""
    raygrid.ray.shutdown()
    raygrid.start_ray(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raygrid.ray, "shutdown", lambda: None)
        yield
    raygrid.ray.shutdown()


def run(folder: Path, *words: str) -> dict[str, Any]:
    config = configure.resolve("fcit-mini-short", [*WORDS, f"run.dir={folder}", *words])
    tree: dict[str, Any] = json.loads((launch.run(config, Console(quiet=True)) / "summary.json").read_text())
    return tree


def test_one_actor_two_actors_and_no_actor_give_the_same_bits(tmp_path: Path) -> None:
    alone = run(tmp_path / "inprocess", "federation.grid=inprocess")
    for actors in (1, 2):
        simulated = run(tmp_path / f"ray-{actors}", "federation.grid=ray", f"federation.actors={actors}")
        assert simulated["status"] == "completed"
        for key in ("final_state_sha256", "last", "bytes_up", "bytes_down", "bytes_eval", "skipped_rounds"):
            assert simulated[key] == alone[key], key


def test_so_does_a_method_that_fuses_what_it_keeps(tmp_path: Path) -> None:
    words = ("strategy.name=hide", "federation.cohort_size=1")
    alone = run(tmp_path / "inprocess", "federation.grid=inprocess", *words)
    shared = run(tmp_path / "ray", "federation.grid=ray", "federation.actors=2", *words)
    assert [shared[key] for key in ("final_state_sha256", "last")] == [
        alone[key] for key in ("final_state_sha256", "last")
    ]


def test_a_corrupt_base_is_bad_input_from_inside_an_actor_too(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    (base / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(BadInput, match="model.name: cannot load"):
        run(tmp_path / "run", "federation.actors=1", f"model.name={base}")
    assert not (tmp_path / "run").exists()
