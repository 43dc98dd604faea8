"""How fast this machine is: one optimiser step of one cohort and a few answers, through the grid as in a run."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, Message

from fedstrata.core import records
from fedstrata.core.adapters import fresh
from fedstrata.core.config import RunConfig, StrategyConfig
from fedstrata.core.errors import FedstrataError
from fedstrata.core.records import Assignment, Binding, Knowledge, Shard
from fedstrata.server.participation import Visit
from fedstrata.server.preparing import Prepared, on_the_wire
from fedstrata.strategies.finetune import FinetuneConfig

LONG = 5.0  # seconds: what takes longer the first time is not measured once more
FEW = 50  # answers


@dataclass(frozen=True)
class Speed:
    """Seconds of one client's optimiser step in a cohort, and of one answer, in one process."""

    step: float
    answer: float


def measure(prepared: Prepared, visits: Sequence[Visit]) -> Speed:
    """visits: a cohort's, each of another client. What the method does beside plain training is left out.

    Raises:
        FedstrataError: a client failed.
    """
    config = plain(prepared.config)
    told = json.dumps(on_the_wire(config))
    flat = records.arrays(flat=fresh(prepared.layout, prepared.strategy().adapter_rank, config.seed, "measure"))
    asked = [_train(prepared, config, told, visit, flat) for visit in visits]
    step = _twice(prepared, asked) / len(asked)
    seconds, answers = 0.0, 0
    for task in range(len(prepared.scenario.tasks)):
        asked = [_score(prepared, config, told, flat, task)]
        seconds, answers = seconds + _twice(prepared, asked), answers + records.read_shard(asked[0]).stop
        if seconds > LONG:
            break
    return Speed(step, seconds / answers)


def plain(config: RunConfig) -> RunConfig:
    """The same base, data and training without the method, one epoch long; its kind of adapter needs the method."""
    method = config.strategy if _own(config) else FinetuneConfig(projector=config.strategy.projector)
    return replace(config, strategy=method, train=replace(config.train, local_epochs=1))


def _own(config: RunConfig) -> bool:
    """Whether the method trains a kind of adapter of its own."""
    return type(config.strategy).trains is not StrategyConfig.trains


def _train(prepared: Prepared, config: RunConfig, told: str, visit: Visit, flat: ArrayRecord) -> Message:
    """Asks a client to train one batch: the first of as many equal parts of its data as it has batches."""
    pool = prepared.scenario.share_size(visit.tasks, visit.client)
    parts = max(2, pool // min(config.train.batch_size, pool))
    binding = Binding(prepared.run_id, visit.stage, visit.round, visit.client)
    meta = Assignment(binding, visit.tasks, 0, parts, told, prepared.layout.hash)
    message = Message(records.train_content(flat, {}), prepared.roster[visit.client], records.TRAIN)
    return records.address(message, meta)


def _score(prepared: Prepared, config: RunConfig, told: str, flat: ArrayRecord, task: int) -> Message:
    """Asks for the answers to a task's first examples."""
    split, node = config.evaluate.split, next(iter(prepared.roster.values()))
    count = min(FEW, config.evaluate.shard, len(getattr(prepared.scenario.tasks[task], split)))
    adapter, tail = prepared.layout.cut(flat[records.FLAT].numpy())
    known = prepared.strategy().knowledge() if _own(config) else Knowledge((adapter,), shared=tail)
    content = records.knowledge_content(known)
    message = Message(records.with_shard(content, Shard(task, 0, count, split)), node, records.EVALUATE)
    meta = Assignment(Binding(prepared.run_id), (task,), config=told, layout=prepared.layout.hash)
    return records.address(message, meta)


def _twice(prepared: Prepared, asked: Sequence[Message]) -> float:
    """Seconds; the first time pictures are read and memory is found, so the second time counts."""
    first = _once(prepared, asked)
    return first if first > LONG else _once(prepared, asked)


def _once(prepared: Prepared, asked: Sequence[Message]) -> float:
    began = time.perf_counter()
    for reply in prepared.grid.send_and_receive(asked):
        if reply.has_error():
            raise FedstrataError(f"a client failed: {reply.error.reason}")
    return time.perf_counter() - began
