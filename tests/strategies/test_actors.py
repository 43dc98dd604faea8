"""One law more, for every method: whether one Ray actor trains its clients or two share them, the same bits."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedstrata.server import configure, launch, preparing, raygrid
from fedstrata.server.placement import Wanted
from fedstrata.server.raygrid import RayGrid
from fedstrata.strategies import STRATEGIES

SCENARIO = """
tasks:
  names: {generate: fcit-mini/names, train: 12, val: 2, test: 2}
  charts: {generate: fcit-mini/charts, train: 12, val: 2, test: 2}
stages: [[names], [charts]]
partition: {kind: dirichlet, beta: 1.0, min_size: 3}
defaults:
  federation: {clients: 2, clients_per_round: 2, rounds_per_stage: 1, grid: ray, cohort_size: 1}
  train: {lr: 1.0e-3, batch_size: 4, local_epochs: 1}
  evaluate: {split: val}
"""


class Crew(RayGrid):
    """A grid that stays for the next run, which finds clients that remember nothing."""

    def close(self) -> None:
        self._states.clear()


@pytest.fixture(scope="module")
def crews() -> Iterator[dict[int, Crew]]:
    """Number of actors → their grid; the bases that they hold are loaded once for all methods."""
    raygrid.ray.shutdown()
    raygrid.start_ray(3)
    yield {actors: Crew(2, 1, Wanted(local=actors)) for actors in (1, 2)}
    raygrid.ray.shutdown()


@pytest.fixture
def ended(crews: dict[int, Crew], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Any]:
    """(method, actors) → the summary of its run."""
    (tmp_path / "law.yaml").write_text(SCENARIO, encoding="utf-8")
    monkeypatch.setattr(launch, "write_report", lambda _: None)

    def run(name: str, actors: int) -> Any:
        monkeypatch.setattr(preparing, "open_grid", lambda _: crews[actors])
        words = [f"scenario.name={tmp_path / 'law.yaml'}", f"strategy.name={name}", f"federation.actors={actors}"]
        config = configure.resolve("", [*words, f"run.dir={tmp_path / str(actors)}"])
        return json.loads((launch.run(config, Console(quiet=True)) / "summary.json").read_text(encoding="utf-8"))

    return run


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_actor_and_two_end_with_the_same_bits(ended: Callable[[str, int], Any], name: str) -> None:
    one, two = ended(name, 1), ended(name, 2)
    assert [one["plan"]["actors"], two["plan"]["actors"]] == [1, 2]
    for key in ("status", "final_state_sha256", "last", "bytes_up", "bytes_down", "bytes_eval"):
        assert one[key] == two[key], key
    assert one["status"] == "completed"
