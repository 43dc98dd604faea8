"""What a round costs beside its training: fcit-mini over Ray with one actor, against the same cohorts trained alone."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from flwr.app import Message

from fedstrata.benchmarks.measure import Cost, Result, cost, raw
from fedstrata.benchmarks.rounds import Rounds, rounds
from fedstrata.client import world
from fedstrata.client.training import Job, Trained, train
from fedstrata.core import records
from fedstrata.core.seeds import derive
from fedstrata.server.grids import units
from fedstrata.strategies import find

QUICK = ("federation.clients=3", "federation.clients_per_round=2", "train.local_epochs=1", "train.batch_size=64")


def bench(quick: bool = False) -> Result:
    """Wall seconds of whole rounds of stage 1 and of their training alone, turn by turn; the updates must be equal."""
    repeats, words = (1, QUICK) if quick else (15, ())
    with (
        tempfile.TemporaryDirectory() as name,
        rounds(Path(name), ["federation.actors=1", "federation.rounds_per_stage=99", *words]) as run,
    ):
        found = [pair(run) for _ in range(repeats + 1)][1:]  # the first one warms both sides up
    sides = [costs for costs, _ in found]
    share = median(costs["round"].wall / costs["training alone"].wall for costs in sides)
    return Result(
        name="overhead",
        what="a round of fcit-mini (identify, train, gate, aggregate, commit; one actor) / its training alone",
        clock="wall",
        ratios={},
        targets={"round / training alone": 1.10},
        limits={"round / training alone": share},
        pairs=raw(sides),
        equal={"largest difference of a round's aggregate": max(far for _, far in found)},
    )


def pair(run: Rounds) -> tuple[dict[str, Cost], float]:
    """One round, then the same cohorts without server, grid and messages; and how far the two aggregates are apart."""
    whole = cost(run.next)
    cohorts = [jobs_of(unit) for unit in units(run.asked, run.federation.grid.cohort_size)]  # type: ignore[attr-defined]
    config = run.federation.config
    base = world.base_of(config)
    scaling, half = config.lora.scaling, find(config.strategy.name).local_half()
    done: list[Trained] = []
    alone = cost(lambda: done.extend(t for jobs in cohorts for t in train(base, jobs, config.train, scaling, half)))
    flats = [trained.flat.astype(np.float64) for trained in done]
    counts = np.array([len(job.examples) for jobs in cohorts for job in jobs], dtype=np.float64)
    mean = np.tensordot(counts / counts.sum(), np.stack(flats), 1)
    adapter = run.federation.strategy.knowledge().adapters[0]  # stage 1 has one task, so one subspace
    return {"round": whole, "training alone": alone}, float(np.abs(mean - adapter).max())


def jobs_of(unit: Sequence[Message]) -> list[Job]:
    """What an actor makes of a cohort's messages."""
    jobs = []
    for task in map(records.train_task, unit):
        config, _, scenario = world.world(task.assignment)
        at = task.assignment.binding
        seed = derive(config.seed, "batches", at.stage, at.round, at.partition)
        jobs.append(Job(world.share(scenario, config, task.assignment), task.flat, seed))
    return jobs
