"""What a run needs before it starts: its scenario, its grid, and what the clients say of the base model."""

import json
import math
import os
from typing import Any

from flwr.serverapp import Grid

from fedstrata import scenarios
from fedstrata.core import config as configuration
from fedstrata.core.adapters import Layout
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.core.records import Description
from fedstrata.scenarios.stream import Scenario
from fedstrata.server.arrivals import ArrivingRayGrid
from fedstrata.server.exchange import describe, find_roster
from fedstrata.server.grids import InProcessGrid, LocalGrid
from fedstrata.server.raygrid import RayGrid
from fedstrata.server.results import config_hash, settings
from fedstrata.strategies import find
from fedstrata.strategies.base import Setup, Strategy

MAX_AUTO_COHORT = 16


def prepare(config: RunConfig, grid: Grid | None = None) -> "Prepared":
    """Everything a run needs, checked, before a run folder exists.

    Raises:
        BadInput: a mistake in the config, the scenario's data or the base model.
    """
    scenario = scenarios.of(config)
    for task in scenario.tasks:
        if not len(getattr(task, config.evaluate.split)):
            raise BadInput(f"evaluate.split: task {task.name} has no {config.evaluate.split} examples to score")
    return Prepared(config, scenario, grid or open_grid(config), owned=grid is None)


class Prepared:
    """A run that could start: its scenario, its grid and what the clients say of the base model."""

    def __init__(self, config: RunConfig, scenario: Scenario, grid: Grid, owned: bool) -> None:
        self.config, self.scenario, self.grid, self.owned = config, scenario, grid, owned
        self.run_id = config_hash(configuration.to_dict(config))[:16]
        self.config_json = json.dumps(on_the_wire(config))
        try:
            self.roster = find_roster(grid, self.config_json, self.run_id)
            self.description = describe(grid, next(iter(self.roster.values())), self.config_json, self.run_id)
        except BaseException:
            self.close()
            raise
        self.layout = Layout.from_json(self.description.layout)
        if isinstance(grid, InProcessGrid | RayGrid):
            grid.cohort_size = cohort_size(config, self.layout)

    def strategy(self) -> Strategy:
        """A fresh strategy."""
        told = setup(self.config, self.description, self.scenario.units)
        return find(self.config.strategy.name)(self.config.strategy, told)

    def bound(self) -> dict[str, Any]:
        """What commits of this run belong to; a resume of anything else is refused."""
        told = settings(configuration.to_dict(self.config))
        return {"settings": told, "base": self.description.base_hash, "scenario": self.scenario.hash}

    def close(self) -> None:
        """Ends the grid, if it was started here."""
        if self.owned and isinstance(self.grid, LocalGrid):
            self.grid.close()


def on_the_wire(config: RunConfig) -> dict[str, Any]:
    """The config that clients get: where a run is written or tracked is nobody's business but the server's."""
    return {key: value for key, value in configuration.to_dict(config).items() if key not in ("run", "track")}


def setup(config: RunConfig, says: Description, tasks: int) -> Setup:
    """What a strategy is told before the first stage."""
    layout, lora = Layout.from_json(says.layout), config.lora
    return Setup(config.seed, layout, lora.rank, tasks, says.tau, says.epsilon, lora.init)


def open_grid(config: RunConfig) -> LocalGrid:
    """The grid named by `federation.grid`."""
    f = config.federation
    if f.grid == "flower":
        raise BadInput("federation.grid: 'flower' runs under Flower itself: flwr run . --run-config 'overrides=\"…\"'")
    guess = math.ceil(f.clients_per_round / 2) if f.cohort_size == "auto" else int(f.cohort_size)
    if f.grid == "inprocess":
        return InProcessGrid(f.clients, guess)
    actors = f.actors or max(1, min(os.cpu_count() or 1, math.ceil(f.clients_per_round / guess)))
    return ArrivingRayGrid(f.clients, guess, actors, f.threads, config.model.device != "cpu", f.ray_address)


def cohort_size(config: RunConfig, layout: Layout) -> int:
    """`federation.cohort_size`, or for auto a pure function of config and base: never of actors or free memory.

    Half of the participants, at most 16, and no more than fit into federation.memory_budget by the estimate that a
    client holds 8 bytes per token and adapted feature, and its adapter with gradient and two moments.
    """
    f, t = config.federation, config.train
    if f.cohort_size != "auto":
        return int(f.cohort_size)
    rows = min(t.micro_batch or t.batch_size, t.batch_size)
    activations = rows * t.max_length * layout.width * 8
    client = activations + layout.size(config.lora.rank) * 16
    fits = int(f.memory_budget * 1e9 // client)
    return max(1, min(math.ceil(f.clients_per_round / 2), MAX_AUTO_COHORT, fits))
