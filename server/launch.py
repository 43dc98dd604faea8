"""From a config to a finished run folder."""

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from flwr.serverapp import Grid
from rich.console import Console

from fedstrata import scenarios
from fedstrata.core import config as configuration
from fedstrata.core.adapters import Layout
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput, FedstrataError, Interrupted
from fedstrata.core.metrics import AccuracyMatrix
from fedstrata.core.records import Description
from fedstrata.core.tracking import open_tracker, plain
from fedstrata.scenarios.stream import Scenario
from fedstrata.server import checkpoint
from fedstrata.server.chronicle import Chronicle
from fedstrata.server.display import Display
from fedstrata.server.exchange import describe, find_roster
from fedstrata.server.federation import Federation
from fedstrata.server.grids import InProcessGrid, LocalGrid
from fedstrata.server.progress import Progress
from fedstrata.server.raygrid import RayGrid
from fedstrata.server.report import write_report
from fedstrata.server.results import config_hash
from fedstrata.server.runfolder import RunFolder
from fedstrata.server.summary import summarise
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


def run(config: RunConfig, console: Console, grid: Grid | None = None) -> Path:
    """Runs a federation to its end; returns the run folder.

    Raises:
        BadInput: before the run folder exists.
        Interrupted: Ctrl-C; the last commit stands.
        FedstrataError: the run failed; the last commit stands.
    """
    folder = _free_folder(config)
    _hello(config, folder, console)
    prepared = prepare(config, grid)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(configuration.to_dict(config), sort_keys=False)
        checkpoint.write_atomic(folder / "config.yaml", text.encode())
        return _run(prepared, folder, console)
    finally:
        prepared.close()


def resume(folder: Path, console: Console, grid: Grid | None = None) -> Path:
    """Goes on from a run's newest commit, or from its start when it has none; ends where `run` would have ended.

    Raises:
        BadInput: no run folder, or a run that is completed.
    """
    found = RunFolder(folder)
    if found.has("summary.json") and found.summary.get("status") == "completed":
        raise BadInput(f"{folder}: is completed, there is nothing to resume")
    config = configuration.from_dict(found.config, _strategy_type(found.config))
    _hello(config, folder, console)
    prepared = prepare(config, grid)
    try:
        return _run(prepared, folder, console, checkpoint.newest(folder / "checkpoints"))
    finally:
        prepared.close()


def _hello(config: RunConfig, folder: Path, console: Console) -> None:
    """The first line, before libraries and base models are loaded, which takes a while."""
    what = f"{config.strategy.name} on {config.scenario.name}, seed {config.seed}"
    console.print(f"{what} → {folder}: starting clients …", highlight=False, markup=False, soft_wrap=True)


def _strategy_type(tree: Mapping[str, Any]) -> type[configuration.StrategyConfig]:
    return find(str(tree["strategy"]["name"])).config_type


def _run(prepared: Prepared, folder: Path, console: Console, commit: checkpoint.Commit | None = None) -> Path:
    config, scenario, strategy = prepared.config, prepared.scenario, prepared.strategy()
    tasks = tuple(task.name for task in scenario.tasks)
    metrics = tuple(task.metric for task in scenario.tasks)
    progress = Progress(AccuracyMatrix(tasks, scenario.stage_names, metrics))
    if commit:
        strategy.load(commit.parts)
        progress = Progress.from_json(commit.progress)
    tracker = open_tracker(config.track, folder, configuration.to_dict(config), folder.name)
    rounds, stages = config.federation.rounds_per_stage, len(scenario.stages)
    display = Display(console, stages, rounds, (progress.stage - 1) * rounds + progress.round - 1)
    federation = Federation(
        config,
        prepared.config_json,
        prepared.run_id,
        scenario,
        strategy,
        prepared.grid,
        prepared.roster,
        folder,
        Chronicle(tracker, display, scenario, strategy),
        progress,
        prepared.description.dim,
    )
    tracker.event("run_started", **_started(prepared, strategy))
    status, began = "failed", time.perf_counter() - progress.wall_seconds
    try:
        skipped = federation.run().skipped_rounds
        if skipped * 2 > stages * rounds:
            raise FedstrataError(f"{skipped} of {stages * rounds} rounds were skipped; see {folder / 'events.jsonl'}")
        status = "completed"
    except KeyboardInterrupt:
        status = "interrupted"
        raise Interrupted(f"interrupted; to go on from the last round: fedstrata resume {folder}") from None
    finally:
        display.close()
        _finish(federation, prepared.description, status, time.perf_counter() - began)
        write_report(folder)
    return folder


def _started(prepared: Prepared, strategy: Strategy) -> dict[str, Any]:
    config = prepared.config
    return {
        "strategy": config.strategy.name,
        "scenario": config.scenario.name,
        "seed": config.seed,
        "uses_task_identity": strategy.uses_task_identity,
        "layout_hash": prepared.layout.hash,
        "base": prepared.description.base,
        "base_hash": prepared.description.base_hash,
    }


def _finish(federation: Federation, description: Description, status: str, wall: float) -> None:
    federation.progress = replace(federation.progress, wall_seconds=wall)
    summary = plain(summarise(federation, description, status))
    checkpoint.write_atomic(federation.folder / "summary.json", json.dumps(summary, indent=1).encode())
    federation.chronicle.tracker.event("run_finished", **summary)
    federation.chronicle.tracker.close()


def _free_folder(config: RunConfig) -> Path:
    """The folder to write; one that holds a run is refused, an empty one accepted.

    Raises:
        BadInput: `run.dir` holds a run already, or files that are not a run's.
    """
    if config.run.dir:
        folder = Path(config.run.dir)
        if (folder / "config.yaml").exists():
            raise BadInput(
                f"run.dir: {folder} already holds a run; name another folder, or use: fedstrata resume {folder}"
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"run.dir: {folder} must be a new or an empty folder")
        return folder
    name = f"{Path(config.scenario.name).stem}-{config.strategy.name.rpartition(':')[2]}-seed{config.seed}"
    choices = [Path("runs") / name, *[Path("runs") / f"{name}-{number}" for number in range(2, 10_000)]]
    return next(path for path in choices if not path.exists())


def open_grid(config: RunConfig) -> LocalGrid:
    """The grid named by `federation.grid`."""
    f = config.federation
    if f.grid == "flower":
        raise BadInput("federation.grid: 'flower' runs under Flower itself: flwr run . --run-config 'overrides=\"…\"'")
    guess = math.ceil(f.clients_per_round / 2) if f.cohort_size == "auto" else int(f.cohort_size)
    if f.grid == "inprocess":
        return InProcessGrid(f.clients, guess)
    actors = f.actors or max(1, min(os.cpu_count() or 1, math.ceil(f.clients_per_round / guess)))
    return RayGrid(f.clients, guess, actors, f.threads, config.model.device != "cpu", f.ray_address)


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


def failed(error: BaseException) -> int:
    """The exit code an error ends the process with."""
    return error.exit_code if isinstance(error, FedstrataError) else 1
