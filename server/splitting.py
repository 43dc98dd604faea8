"""`fedstrata deploy split`: one scenario's data cut into a folder per client, each as its client would hold it.

Trained from these folders, a deployment comes to the same bits as a simulation of the scenario.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedstrata import scenarios
from fedstrata.core import config as configuration
from fedstrata.core.config import RunConfig, require
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.definition import HeldTask
from fedstrata.scenarios.own import FILE, open_own
from fedstrata.scenarios.schema import fill
from fedstrata.scenarios.stream import Example, Scenario, Task
from fedstrata.server import configure
from fedstrata.strategies import STRATEGIES


def resolve(recipe: str, words: Sequence[str], clients: int) -> RunConfig:
    """The run's config for so many clients; a round takes no more of them than there are."""
    config = configure.resolve(recipe, words)
    federation = {"clients": clients, "clients_per_round": min(clients, config.federation.clients_per_round)}
    tree = configuration.to_dict(config)
    return configuration.from_dict({**tree, "federation": {**tree["federation"], **federation}}, type(config.strategy))


def split(config: RunConfig, to: Path) -> list[Path]:
    """Writes `client-<k>/` for every client and `server/scenario.yaml`; returns these folders.

    Raises:
        BadInput: a scenario whose timeline a folder cannot say, a metric that clients cannot score apart, or folders
            that hold something.
    """
    scenario = scenarios.of(config)
    simple = type(scenario.timeline).__name__ == "Clocked" and scenario.assign is None and not _moves(scenario)
    require(simple, "scenario.name", "homogeneous, with arrival kind stages and repeats same", config.scenario.name)
    server = _server(scenario, config)
    for name, block in server["tasks"].items():
        fill(HeldTask, block, f"tasks.{name}")
    folders = [to / f"client-{client}" for client in range(scenario.client_count)] + [to / "server"]
    for folder in folders:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"--to: {folder} must be new or empty")
    for client, folder in enumerate(folders[:-1]):
        _write_client(scenario, config, client, folder)
    folders[-1].mkdir(parents=True, exist_ok=True)
    _dump(folders[-1] / FILE, server)
    return folders


def _moves(scenario: Scenario) -> bool:
    """Whether some client's rows of a task are not the same at all times."""
    clients, stages = range(scenario.client_count), range(1, len(scenario.stages) + 1)
    return any(
        scenario.timeline.tasks(client, stage, 1) != scenario.stages[stage - 1]
        or scenario.share_size([task], client, stage, 1) != len(scenario.shares[task][client])
        for client in clients
        for stage in stages
        for task in scenario.stages[stage - 1]
    )


def _write_client(scenario: Scenario, config: RunConfig, client: int, folder: Path) -> None:
    """The tasks of which the client holds rows, with its part of their test and validation examples."""
    tasks = {}
    for number, task in enumerate(scenario.tasks):
        holders = [other for other, rows in enumerate(scenario.shares[number]) if len(rows)]
        if client in holders:
            mine = scenario.read(scenario.share([number], client))
            place, every = holders.index(client), len(holders)
            parts = {"train": mine, "test": list(task.test[place::every]), "val": list(task.val[place::every])}
            if not parts["test"]:
                raise BadInput(f"--clients: task {task.name} has {len(task.test)} test examples for {every} clients")
            tasks[task.name] = _write_task(task, parts, folder / task.name)
    stages = [[scenario.tasks[t].name for t in stage if scenario.tasks[t].name in tasks] for stage in scenario.stages]
    folder.mkdir(parents=True, exist_ok=True)
    _dump(folder / FILE, {"tasks": tasks, "stages": stages})
    _check(scenario, config, client, folder)


def _write_task(task: Task, parts: dict[str, list[Example]], folder: Path) -> dict[str, Any]:
    """Instruction files and pictures of one task; returns its block of the scenario file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, examples in parts.items():
        rows = [_record(example, name, number, folder) for number, example in enumerate(examples)]
        text = json.dumps(rows, ensure_ascii=False, indent=0)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    block: dict[str, Any] = {name: f"{task.name}/{name}.json" if parts[name] else "" for name in parts}
    pictures = {"images": f"{task.name}/images"} if any((folder / "images").iterdir()) else {}
    return {**block, **pictures, "metric": task.metric, "beside": list(task.beside)}


def _record(example: Example, part: str, number: int, folder: Path) -> dict[str, Any]:
    """One LLaVA record; its picture, if it has one, is written beside it."""
    if example.references:
        raise BadInput(f"task {folder.name}: {example.id} has several right answers, which no instruction file can say")
    turns = []
    for question, answer in ((example.question, example.answer), *example.more):
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if example.image is None:
        return {"id": example.id, "conversations": turns}
    name = f"{part}-{number:05d}.png"
    example.image.open().save(folder / "images" / name)
    return {"id": example.id, "image": name, "conversations": turns}


def _check(scenario: Scenario, config: RunConfig, client: int, folder: Path) -> None:
    """Reads the folder again. Raises `BadInput` where the files cannot say what the scenario says."""
    names, rounds = [task.name for task in scenario.tasks], config.federation.rounds_per_stage
    own = open_own(folder, names, client, scenario.client_count, config.seed, rounds)
    for number, task in enumerate(scenario.tasks):
        want, came = (each.read(each.share([number], client)) for each in (scenario, own))
        if [(e.question, e.answer, e.more) for e in want] != [(e.question, e.answer, e.more) for e in came]:
            raise BadInput(f"task {task.name}: its texts do not survive being written as instruction files")


def _server(scenario: Scenario, config: RunConfig) -> dict[str, Any]:
    """The server's file: tasks, metrics and stages, and what the scenario suggests; no data."""
    tasks = {t.name: {"held": "clients", "metric": t.metric, "beside": list(t.beside)} for t in scenario.tasks}
    name, told = config.scenario.name, config.federation
    defaults = scenarios.defaults(name)
    sizes = {"clients": told.clients, "clients_per_round": told.clients_per_round}
    defaults["federation"] = {**defaults.get("federation", {}), **sizes}
    tuned = {strategy: found for strategy in STRATEGIES if (found := scenarios.tuned(name, strategy))}
    stages = [[scenario.tasks[task].name for task in stage] for stage in scenario.stages]
    return {"tasks": tasks, "stages": stages, "defaults": defaults, "tuned": tuned}


def _dump(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
