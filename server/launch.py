"""From a config to a finished run folder."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from flwr.serverapp import Grid
from rich.console import Console

from fedstrata.core import config as configuration
from fedstrata.core import durable
from fedstrata.core.adapters import unfusable
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput, FedstrataError, Interrupted
from fedstrata.core.metrics import AccuracyMatrix
from fedstrata.core.records import Description
from fedstrata.core.tracking import open_tracker
from fedstrata.server import beyond, ending, guard, memory, resuming
from fedstrata.server.checkpoint import Found
from fedstrata.server.chronicle import Chronicle
from fedstrata.server.display import Display
from fedstrata.server.federation import Federation
from fedstrata.server.plan import plan_of
from fedstrata.server.preparing import Prepared, prepare
from fedstrata.server.progress import Progress
from fedstrata.server.report import write_report
from fedstrata.server.runfolder import CONFIG, RunFolder, locked, unused
from fedstrata.server.summary import summarise
from fedstrata.strategies.base import Parts, Strategy


def run(config: RunConfig, console: Console, grid: Grid | None = None) -> Path:
    """Runs a federation to its end; returns the run folder.

    Raises:
        BadInput: before the run folder exists.
        Interrupted: Ctrl-C; the last commit stands.
        FedstrataError: the run failed; the last commit stands.
    """
    folder = _free_folder(config)
    _hello(config, folder, console)
    beyond.check(config)
    prepared = prepare(config, grid)
    try:
        with storage(folder), locked(folder):
            if (folder / CONFIG).exists():
                raise _taken(folder)
            text = yaml.safe_dump(configuration.to_dict(prepared.config), sort_keys=False)
            durable.write_atomic(folder / CONFIG, text.encode())
            guard.tell(folder=str(folder))
            return _run(prepared, folder, console)
    finally:
        prepared.close()


def resume(
    folder: Path,
    console: Console,
    grid: Grid | None = None,
    words: Sequence[str] = (),
    from_stage: int | None = None,
) -> Path:
    """Goes on from a run's newest commit, or from its start when it has none; ends where `run` would have ended.

    words: key=value words that change how fast the run is; from_stage: goes back to the start of this stage.

    Raises:
        BadInput: no run folder, one that another process writes, a run that is completed, words that would change the
            result, a config, base or scenario other than the commit's, or damaged commits.
    """
    found = RunFolder(folder)
    config = resuming.read_config(found, words)
    with storage(folder), locked(folder):
        guard.tell(folder=str(folder))
        start = resuming.starting_point(found, from_stage)
        _hello(config, folder, console)
        prepared = prepare(config, grid, start.commit.progress.get("lineage", "") if start.commit else "")
        try:
            return _run(prepared, folder, console, start)
        finally:
            prepared.close()


@contextmanager
def storage(folder: Path) -> Iterator[None]:
    """A disk that is full or refuses to be written is no bug: one clear line. Raises `Interrupted` if a run began."""
    try:
        yield
    except OSError as error:
        if error.errno not in durable.STORAGE or not _about(error, folder):
            raise
        what = f"{error.filename or folder}: cannot be written: {error.strerror}"
        if not (folder / CONFIG).exists():
            raise FedstrataError(f"{what}; the run has not begun") from error
        way = f"fedstrata resume {folder}"
        raise Interrupted(f"{what}; the last commit stands; when that is mended: {way}") from error


def _about(error: OSError, folder: Path) -> bool:
    """Whether it is the run folder that refuses; a write that fails names no file."""
    name = Path(str(error.filename or folder))
    return name.is_relative_to(folder) or folder.is_relative_to(name)


def _hello(config: RunConfig, folder: Path, console: Console) -> None:
    """The first line, before libraries and base models are loaded, which takes a while."""
    what = f"{config.strategy.name} on {config.scenario.name}, seed {config.seed}"
    console.print(f"{what} → {folder}: starting clients …", highlight=False, markup=False, soft_wrap=True)
    if why := unfusable(config):
        line = f"cohorts: one client at a time, because {why}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _run(prepared: Prepared, folder: Path, console: Console, start: Found | None = None) -> Path:
    """The federation from its start, or on from a commit, to a finished folder. start: None for a new run."""
    federation = federation_of(prepared, folder, console, start)
    config, progress = prepared.config, federation.progress
    all_rounds = config.federation.rounds_per_stage * len(prepared.scenario.stages)
    status, began = "failed", time.perf_counter() - progress.wall_seconds
    ended: float | None = None
    elsewhere: dict[str, float | None] = {}
    try:
        if start:
            _tell_resumed(federation, start)
        skipped = federation.run().skipped_rounds
        if skipped * 2 > all_rounds:
            raise FedstrataError(f"{skipped} of {all_rounds} rounds were skipped; see {folder / 'events.jsonl'}")
        elsewhere = beyond.score(federation)
        ended = time.perf_counter()
        prepared.close()  # a Ray that dies while it is left may still take this process along
        status = "completed"
    except KeyboardInterrupt:
        status = "interrupted"
        raise Interrupted(f"interrupted; to go on from the last round: fedstrata resume {folder}") from None
    except Interrupted as error:
        status = "interrupted"
        raise Interrupted(f"{error}; the last commit stands; to go on from it: fedstrata resume {folder}") from None
    except OSError:
        status = "interrupted"  # `storage` says why
        raise
    finally:
        federation.chronicle.display.close()
        wall = (ended or time.perf_counter()) - began
        _finish(federation, prepared.description, status, wall, elsewhere)
        write_report(folder)
    return folder


def federation_of(prepared: Prepared, folder: Path, console: Console, start: Found | None) -> Federation:
    """A federation at its start, or where a commit stands."""
    config, scenario, strategy = prepared.config, prepared.scenario, prepared.strategy()
    tasks = tuple(task.name for task in scenario.tasks)
    metrics = tuple(task.metric for task in scenario.tasks)
    progress = Progress(AccuracyMatrix(tasks, scenario.stage_names, metrics))
    commit, tokens, bound = start.commit if start else None, {}, prepared.bound()
    if commit:
        resuming.check_bound(folder, commit, bound)
        strategy.load(commit.parts)
        tokens, progress = memory.unpack(commit.memory, strategy), Progress.from_json(commit.progress)
    if config.federation.grid == "flower":
        progress = replace(progress, lineage=prepared.run_id)
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
        bound,
    )
    federation.tokens = tokens
    federation.clients.restore(commit.memory if commit else Parts({}))
    federation.chronicle.plan = plan = plan_of(prepared)
    tracker.event("run_started", **_started(prepared, strategy), plan=plan.json())
    if why := unfusable(config):
        tracker.event("one_client_at_a_time", reason=why)
    return federation


def _tell_resumed(federation: Federation, start: Found) -> None:
    """Events and the matrix on disk go back to where the commit stands; without one, to the beginning."""
    at = federation.progress
    stage, round_ = (at.stage, at.round) if start.commit else (0, 0)
    versions = resuming.other_versions(start.commit, federation.bound) if start.commit else []
    federation.chronicle.resumed(at.commits, stage, round_, start.damaged, versions)
    if start.commit:
        federation.write_matrix()


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


def _finish(
    federation: Federation, description: Description, status: str, wall: float, elsewhere: Mapping[str, float | None]
) -> None:
    federation.progress = replace(federation.progress, wall_seconds=wall)
    told = {**summarise(federation, description, status), **elsewhere}
    ending.write(federation.folder, federation.progress, told, federation.chronicle.tracker)


def _free_folder(config: RunConfig) -> Path:
    """The folder to write; one that holds a run is refused, an empty one accepted.

    Raises:
        BadInput: `run.dir` holds a run already, or files that are not a run's.
    """
    if config.run.dir:
        folder = Path(config.run.dir)
        if (folder / CONFIG).exists():
            raise _taken(folder)
        if folder.exists() and not (folder.is_dir() and unused(folder)):
            raise BadInput(f"run.dir: {folder} must be a new or an empty folder")
        return folder
    name = f"{Path(config.scenario.name).stem}-{config.strategy.name.rpartition(':')[2]}-seed{config.seed}"
    choices = [Path("runs") / name, *[Path("runs") / f"{name}-{number}" for number in range(2, 10_000)]]
    return next(path for path in choices if not path.exists())


def _taken(folder: Path) -> BadInput:
    return BadInput(f"run.dir: {folder} already holds a run; name another folder, or use: fedstrata resume {folder}")
