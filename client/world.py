"""What a message is about, in this process: its run's config, base model and scenario, each made once and kept."""

import json
from functools import lru_cache

import torch

from fedstrata import scenarios
from fedstrata.client import own
from fedstrata.client.model import BaseModel, load_base
from fedstrata.core import kernels, records
from fedstrata.core.config import RunConfig, from_dict
from fedstrata.core.errors import BadInput
from fedstrata.core.records import Assignment
from fedstrata.core.seeds import generator
from fedstrata.scenarios.stream import Example, Scenario
from fedstrata.strategies import find
from fedstrata.strategies.base import Row


def world(at: Assignment) -> tuple[RunConfig, BaseModel, Scenario]:
    """The run's config, base model and scenario, cached in the process.

    Raises:
        BadInput: the server's adapters have another layout than this base model.
    """
    config = read_config(at.config)
    base = base_of(config)
    if at.layout and at.layout != base.layout.hash:
        raise BadInput(f"layout: the server's adapters are {at.layout}, this base model's are {base.layout.hash}")
    if names := own.names_of(at.config):
        return config, base, own.scenario(config, names, at.binding.partition)
    return config, base, scenario_of(at.config)


@lru_cache(maxsize=4)
def read_config(text: str) -> RunConfig:
    """A config from a message."""
    tree = json.loads(text)
    tree.pop(records.HELD, None)
    return from_dict(tree, find(tree["strategy"]["name"]).config_type)


def base_of(config: RunConfig) -> BaseModel:
    """The process's base model; thread count and kernels are set before the first of them runs."""
    torch.set_num_threads(config.federation.threads)
    kernels.use(config.model)
    base = load_base(json.dumps(vars(config.model)), json.dumps(vars(config.lora)), config.strategy.projector)
    base.train_as(config.strategy)
    return base


@lru_cache(maxsize=2)
def scenario_of(text: str) -> Scenario:
    return scenarios.of(read_config(text))


def share(scenario: Scenario, config: RunConfig, at: Assignment) -> list[Example]:
    """The examples of `share_rows`."""
    return scenario.read(share_rows(scenario, config, at))


def share_rows(scenario: Scenario, config: RunConfig, at: Assignment) -> list[Row]:
    """[(task, row)] of this client-round: the client's share of its tasks, or the part-th of `parts` draws from it.

    Draws are without replacement until the pool is exhausted, then a new order begins (joint training). A pool
    smaller than `parts` gives one example at a time.
    """
    when = (at.binding.stage, at.binding.round) if at.parts == 1 else ()
    pool = scenario.share(at.tasks, at.binding.partition, *when)
    if not pool:
        raise BadInput(f"client {at.binding.partition}: has no examples of tasks {list(at.tasks)}")
    if at.parts == 1:
        return pool
    size = max(1, len(pool) // at.parts)
    draws = len(pool) // size
    cycle, part = divmod(at.part, draws)
    order = generator(config.seed, "pool", at.binding.partition, cycle).permutation(len(pool))
    last = len(pool) if part == draws - 1 else (part + 1) * size
    return [pool[row] for row in order[part * size : last]]
