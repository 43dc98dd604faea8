"""What a run will take: processes, memory, bytes, time. `fedstrata run --dry-run` prints it and trains nothing.

A run writes its plan down at its start, and its summary and report set beside it what came of it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml
from rich.console import Console

from fedstrata.core import codec
from fedstrata.core.adapters import Layout
from fedstrata.core.config import RunConfig, to_dict
from fedstrata.core.privacy import token_options
from fedstrata.scenarios.stream import Scenario
from fedstrata.server import calibrate, preparing
from fedstrata.server.fitting import on_one_device
from fedstrata.server.holdings import client_table, holdings
from fedstrata.server.participation import Visit, share_size, visits
from fedstrata.server.report import human_bytes, human_seconds
from fedstrata.server.scoring import cut
from fedstrata.strategies.base import Strategy


@dataclass(frozen=True)
class Bytes:
    """Raw tensor bytes of a whole run; bytes_eval assumes that methods with subspaces end with one per task."""

    up: int
    down: int
    evaluation: int


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        cohorts: of a round with all its participants.
        actor_memory: bytes of an actor with base and cohort, about.
        device: what actors lie on.
        steps: clients' optimiser steps, of the whole run.
        answers: examples that are scored, of the whole run, in so many `scorings`.
    """

    actors: int
    cohort_size: int
    cohorts: int
    actor_memory: int
    device: str
    bytes: Bytes
    steps: int
    answers: int
    scorings: int

    def json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def seconds(self, step: float, answer: float) -> float:
        """Of the whole run, for seconds of one client's step and of one answer with all actors at work."""
        return self.steps * step + self.answers * answer


def plan_of(prepared: preparing.Prepared, actors: int | None = None) -> Plan:
    """The plan of a run that could start. actors: of another grid than the one it is prepared for."""
    config, scenario, strategy = prepared.config, prepared.scenario, prepared.strategy()
    numbers = range(1, len(scenario.stages) + 1)
    stages = [list(visits(config, scenario, stage, strategy.pooled)) for stage in numbers]
    steps = [sum(_steps(config, scenario, visit, strategy) for visit in stage) for stage in stages]
    parts = [part.shard for part in cut(scenario, config.evaluate.split, config.evaluate.shard)]
    tests = sum(shard.stop - shard.start for shard in parts)
    return Plan(
        actors=actors or prepared.actors,
        cohort_size=prepared.cohort,
        cohorts=math.ceil(config.federation.clients_per_round / prepared.cohort),
        actor_memory=prepared.memory.actor(prepared.cohort),
        device=prepared.memory.where.device,
        bytes=_bytes(config, scenario, strategy, prepared.layout, prepared.description.dim, stages),
        steps=sum(steps),
        answers=tests * (len(stages) + 1),
        scorings=len(stages) + 1,
    )


def _steps(config: RunConfig, scenario: Scenario, visit: Visit, strategy: Strategy) -> int:
    """A client-round's optimiser steps; a pooled method's draws are taken to be equal."""
    when = (0, 0) if strategy.pooled else (visit.stage, visit.round)
    samples = scenario.share_size(visit.tasks, visit.client, *when)
    samples = share_size(samples, 0, len(scenario.stages)) if strategy.pooled else samples
    samples += strategy.rehearsed(visit.stage, samples)
    return math.ceil(samples / config.train.batch_size) * config.train.local_epochs


def show(config: RunConfig, console: Console) -> None:
    """Prints the plan of a run.

    Raises:
        BadInput: whatever would stop the run before its first round.
    """
    local = replace(config, federation=replace(config.federation, grid="inprocess"))
    prepared = preparing.prepare(local)
    try:
        config = replace(prepared.config, federation=config.federation)  # with what was resolved, as a run writes it
        text = yaml.safe_dump(to_dict(config), sort_keys=False)
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        scenario = prepared.scenario
        pooled = prepared.strategy().pooled
        held = [v for stage in range(1, len(scenario.stages) + 1) for v in visits(config, scenario, stage)]
        console.print(client_table(scenario.stage_names, holdings(scenario, held)))
        plan = plan_of(prepared, preparing.actors_of(config) if config.federation.grid == "ray" else None)
        prepared.memory.check(config, plan.cohort_size, on_one_device(config, plan.actors, prepared.memory.where))
        first = [visit for visit in visits(config, scenario, 1, pooled) if visit.round == 1]
        speed = calibrate.measure(prepared, first[: plan.cohort_size])
        for line in lines(plan, prepared, speed):
            console.print(line, highlight=False, soft_wrap=True)
    finally:
        prepared.close()


def lines(plan: Plan, prepared: preparing.Prepared, speed: calibrate.Speed) -> list[str]:
    """What `--dry-run` says below the tables."""
    layout, memory = prepared.layout, prepared.memory
    size = layout.size(prepared.strategy().adapter_rank if layout.kind == "prompts" else prepared.config.lora.rank)
    told = [
        f"scenario hash {prepared.scenario.hash}",
        f"{plan.actors} actors on {plan.device} · cohorts of {plan.cohort_size} · {plan.cohorts} a round",
        f"adapter {size:,} parameters per subspace",
        f"memory of an actor: about {human_bytes(plan.actor_memory)} (base {human_bytes(memory.where.base)}, "
        f"cohort at most {human_bytes(memory.cohort(plan.cohort_size))})",
    ]
    for name, count in (("up", plan.bytes.up), ("down", plan.bytes.down), ("evaluation", plan.bytes.evaluation)):
        told.append(f"predicted bytes {name}: {count:,} ({human_bytes(count)})")
    about = human_seconds(_seconds(plan, prepared, speed))
    return [*told, f"predicted time: about {about} (measured here: a step of one cohort, some answers)"]


def seconds(config: RunConfig) -> float:
    """How long a run will take in one process, measured here, without starting it. Raises `BadInput` as `show` does."""
    prepared = preparing.prepare(replace(config, federation=replace(config.federation, grid="inprocess")))
    try:
        first = [v for v in visits(config, prepared.scenario, 1, prepared.strategy().pooled) if v.round == 1]
        return _seconds(plan_of(prepared), prepared, calibrate.measure(prepared, first[: prepared.cohort]))
    finally:
        prepared.close()


def _seconds(plan: Plan, prepared: preparing.Prepared, speed: calibrate.Speed) -> float:
    where = prepared.memory.where
    devices = math.ceil(plan.actors / on_one_device(prepared.config, plan.actors, where))
    busy = devices if where.gpu else plan.actors
    return plan.seconds(speed.step / min(busy, plan.cohorts), speed.answer / busy)


def predict(config: RunConfig, scenario: Scenario, strategy: Strategy, layout: Layout, dim: int) -> Bytes:
    """What the run will move if every participant trains and answers; a client's token is asked for once per data.

    dim: length of an identity token.
    """
    numbers = range(1, len(scenario.stages) + 1)
    stages = [list(visits(config, scenario, stage, strategy.pooled)) for stage in numbers]
    return _bytes(config, scenario, strategy, layout, dim, stages)


def _bytes(
    config: RunConfig,
    scenario: Scenario,
    strategy: Strategy,
    layout: Layout,
    dim: int,
    stages: Sequence[Sequence[Visit]],
) -> Bytes:
    """stages: every visit of each."""
    whole = layout.size(strategy.adapter_rank)
    beside = [strategy.beside(visit.stage, visit.round) for stage in stages for visit in stage]
    token = codec.nbytes(token_options(config.strategy).token_upload, dim) if strategy.needs_tokens else 0
    asked = {(v.client, scenario.data_key(v.tasks, v.client, v.stage, v.round)) for stage in stages for v in stage}
    up = sum(codec.nbytes(config.federation.upload, whole) + 4 * more for more, _ in beside) + token * len(asked)
    down = sum(4 * (whole + more) for _, more in beside)
    return Bytes(up, down, _scored(config, scenario, strategy, layout, 4 * dim if token else 0, stages))


def _scored(
    config: RunConfig,
    scenario: Scenario,
    strategy: Strategy,
    layout: Layout,
    token: int,
    stages: Sequence[Sequence[Visit]],
) -> int:
    """Bytes of all scorings: every shard gets all that is known then. A shared tail travels once."""
    known, moved, apart = len(strategy.knowledge().adapters), 0, config.strategy.projector == "per-subspace"
    for done in range(len(stages) + 1):
        seen = {task for stage in stages[:done] for visit in stage for task in visit.tasks}
        adapter = 4 * layout.lora.size(strategy.rank_after(done))
        subspaces = known or len(seen)
        moved += subspaces * (adapter + token) + 4 * layout.tail * (subspaces if apart else 1)
    return moved * len(cut(scenario, config.evaluate.split, config.evaluate.shard))
