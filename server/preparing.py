"""What a run needs before it starts: its scenario, its grid, and what the clients say of the base model."""

import json
import math
import os
import secrets
from typing import Any

from flwr.serverapp import Grid

from fedstrata import scenarios
from fedstrata.core import config as configuration
from fedstrata.core import kernels, machine
from fedstrata.core.adapters import FUSED, Layout, unfusable
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.core.estimate import Shape, client_bytes, work_of
from fedstrata.core.records import HELD, Description
from fedstrata.scenarios.held import HeldScenario
from fedstrata.scenarios.stream import Scenario
from fedstrata.server import noise
from fedstrata.server.arrivals import ArrivingRayGrid
from fedstrata.server.fitting import memory_of, on_one_device
from fedstrata.server.grids import InProcessGrid, LocalGrid
from fedstrata.server.placement import Wanted
from fedstrata.server.raygrid import RayGrid
from fedstrata.server.results import config_hash, settings, versions
from fedstrata.server.roster import Roster
from fedstrata.strategies import find
from fedstrata.strategies.base import Setup, Strategy

MAX_AUTO_COHORT = 16


def prepare(config: RunConfig, grid: Grid | None = None, lineage: str = "") -> "Prepared":
    """Everything a run needs, checked, before a run folder exists.

    lineage: that of a deployed run which is gone on with; empty for a new one.

    Raises:
        BadInput: a mistake in the config, the scenario's data or the base model.
    """
    check_kind(config)
    noise.check(config)
    config = kernels.settled(config)
    scenario = scenarios.of(config)
    if isinstance(scenario, HeldScenario) and (grid is None or isinstance(grid, LocalGrid)):
        raise BadInput(f"scenario.name: {config.scenario.name}: clients hold its data; it runs in a deployment only")
    for task in scenario.tasks if not isinstance(scenario, HeldScenario) else ():
        if not len(getattr(task, config.evaluate.split)):
            raise BadInput(f"evaluate.split: task {task.name} has no {config.evaluate.split} examples to score")
    lineage = lineage or lineage_of(config)
    return Prepared(config, scenario, grid or open_grid(config), lineage, owned=grid is None)


def lineage_of(config: RunConfig) -> str:
    """What a new run is called to its clients: 16 hex digits.

    Of a simulation a hash of the config. A deployment's clients outlive the run, so there it is drawn: what they
    remember of another run with the same config is not this one's.
    """
    drawn = config.federation.grid == "flower"
    return secrets.token_hex(8) if drawn else config_hash(configuration.to_dict(config))[:16]


def check_kind(config: RunConfig) -> None:
    """Raises `BadInput` for a method that mixes adapters of a kind whose sum means nothing."""
    strategy, kind = config.strategy, config.lora.kind
    if kind not in FUSED and find(strategy.name).mixes(strategy):
        rule = f"must be {' or '.join(FUSED)} where several adapters answer one input, got {kind!r}"
        activation = getattr(strategy, "activation", "")
        how = f" and strategy.activation={activation}; strategy.activation=argmax works" if activation else ""
        raise BadInput(f"lora.kind: {rule} with strategy.name={strategy.name}{how}")


class Prepared:
    """A run that could start: its scenario, its grid and what the clients say of the base model."""

    def __init__(self, config: RunConfig, scenario: Scenario, grid: Grid, run_id: str, owned: bool) -> None:
        self.config, self.scenario, self.grid, self.owned = config, scenario, grid, owned
        self.run_id = run_id
        self.config_json = json.dumps(on_the_wire(config, scenario))
        try:
            f = config.federation
            self.roster = Roster(grid, scenario, self.config_json, run_id, f.timeout, f.max_samples)
            self.description = self.roster.description
        except BaseException:
            self.close()
            raise
        self.layout = Layout.from_json(self.description.layout)
        try:
            self._fit()
        except BaseException:
            self.close()
            raise

    def _fit(self) -> None:
        """Sets the size of cohorts, and refuses those for which there is no memory."""
        rank = self.strategy().adapter_rank
        self.cohort = cohort_size(self.config, self.layout, self.description.shape, rank)
        self.memory = memory_of(self.config, self.scenario, self.layout, self.description, rank)
        if isinstance(self.grid, InProcessGrid | RayGrid):
            self.grid.cohort_size = self.cohort
            self.memory.check(self.config, self.cohort, on_one_device(self.config, self.actors, self.memory.where))

    @property
    def actors(self) -> int:
        """Processes that hold a base model."""
        if isinstance(self.grid, RayGrid):
            return self.grid.actors
        return 1 if isinstance(self.grid, InProcessGrid) else len(self.roster)

    def strategy(self) -> Strategy:
        """A fresh strategy."""
        told = setup(self.config, self.description, self.scenario.units)
        return find(self.config.strategy.name).variant(self.config.strategy)(self.config.strategy, told)

    def bound(self) -> dict[str, Any]:
        """What commits of this run belong to; a resume of anything else is refused, with other versions warned of."""
        told = settings(configuration.to_dict(self.config))
        belongs = {"settings": told, "base": self.description.base_hash, "scenario": self.scenario.hash}
        return {**belongs, "versions": versions()}

    def close(self) -> None:
        """Ends the grid, if it was started here; once."""
        if self.owned and isinstance(self.grid, LocalGrid):
            self.owned = False
            self.grid.close()


def on_the_wire(config: RunConfig, scenario: Scenario | None = None) -> dict[str, Any]:
    """The config that clients get: where a run is written or tracked is nobody's business but the server's.

    Of a scenario whose data the clients hold also the tasks' names: each finds its own data by them.
    """
    told = {key: value for key, value in configuration.to_dict(config).items() if key not in ("run", "track")}
    return told | ({HELD: [task.name for task in scenario.tasks]} if isinstance(scenario, HeldScenario) else {})


def setup(config: RunConfig, says: Description, tasks: int) -> Setup:
    """What a strategy is told before the first stage."""
    layout, lora, f = Layout.from_json(says.layout), config.lora, config.federation
    told = (config.seed, layout, lora.rank, tasks, says.tau, says.epsilon, lora.init)
    return Setup(*told, f.clients, f.rounds_per_stage, says.words, says.words_tau)


def open_grid(config: RunConfig) -> LocalGrid:
    """The grid named by `federation.grid`."""
    f = config.federation
    if f.grid == "flower":
        raise BadInput("federation.grid: 'flower' runs under Flower itself: flwr run . --run-config 'overrides=\"…\"'")
    guess = largest_cohort(config)  # until clients have said how large the base is
    if f.grid == "inprocess":
        return InProcessGrid(f.clients, guess)
    wanted = Wanted(f.actors, actors_of(config), f.threads, config.model.device, f.ray_address)
    return ArrivingRayGrid(f.clients, guess, wanted, f.cohort_timeout)


def actors_of(config: RunConfig) -> int:
    """`federation.actors`; for 0 one per GPU, without GPUs one per core, and at most one per cohort of a round."""
    f = config.federation
    places = (machine.gpus() if config.model.device != "cpu" else 0) or os.cpu_count() or 1
    return f.actors or max(1, min(places, math.ceil(f.clients_per_round / largest_cohort(config))))


def largest_cohort(config: RunConfig) -> int:
    """`federation.cohort_size`; for auto half of the participants, so that two actors have work, and at most 16.

    Clients that cannot be fused are trained one at a time.
    """
    f = config.federation
    if f.cohort_size != "auto":
        return int(f.cohort_size)
    return 1 if unfusable(config) else min(math.ceil(f.clients_per_round / 2), MAX_AUTO_COHORT)


def cohort_size(config: RunConfig, layout: Layout, shape: str, rank: int) -> int:
    """`federation.cohort_size`; for auto the largest that fits into federation.memory_budget by `core.estimate`.

    A pure function of config and base: never of actors or free memory.

    shape: as the client's description says it; rank: of what a client trains.
    """
    most = largest_cohort(config)
    if config.federation.cohort_size != "auto" or not shape:
        return most
    client = client_bytes(Shape.from_json(shape), layout, rank, work_of(config))
    return max(1, min(most, int(config.federation.memory_budget * 1e9 // client)))
