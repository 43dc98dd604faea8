"""Whether a run fits into memory. One that cannot is refused before its start."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from flwr.serverapp import Grid

from fedstrata.core import machine
from fedstrata.core.adapters import Layout, unfusable
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput
from fedstrata.core.estimate import Shape, client_bytes, work_of
from fedstrata.core.machine import PROCESS, Footprint
from fedstrata.core.records import Description
from fedstrata.scenarios.stream import Example, Scenario
from fedstrata.server.grids import InProcessGrid
from fedstrata.server.raygrid import RayGrid

SAMPLED = 1000  # rows of a task whose length is looked at, spread over it
TEMPLATE = 64  # tokens that a chat template puts around a question, at most


@dataclass(frozen=True)
class Memory:
    """What an actor holds, in bytes.

    Attributes:
        client: of one more client in a cohort, at most; 0: unknown.
        where: what the client that was asked said of its base and its device.
        fused: whether the clients of a cohort are in memory together.
    """

    client: int
    where: Footprint
    fused: bool = True

    def cohort(self, size: int) -> int:
        """Of a cohort of this size, at most."""
        return self.client * (size if self.fused else 1)

    def actor(self, size: int) -> int:
        """Of an actor while it trains; on a CPU with its process as it was before, on a GPU with its base."""
        return self.cohort(size) + (self.where.base if self.where.gpu else self.where.process)

    def check(self, config: RunConfig, size: int, actors: int) -> None:
        """Whether these actors fit beside one another on the device that was asked; its own base is loaded already.

        Raises:
            BadInput: they do not; names what is needed, what there is and the settings to lower.
        """
        need = actors * self.cohort(size) + (actors - 1) * (self.where.private + PROCESS)
        if not self.where.total or need <= self.where.free:
            return
        parts = f"{actors} × a cohort of {size} at up to {_gb(self.client)} a client"
        parts += f" + {actors - 1} × {_gb(self.where.private + PROCESS)} of base and process" if actors > 1 else ""
        raise BadInput(
            f"federation.cohort_size: {_gb(need)} of memory are needed ({parts}), but {self.where.device} has "
            f"{_gb(self.where.free)} of {_gb(self.where.total)} left; lower {_ways(config, size, actors)}"
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _ways(config: RunConfig, size: int, actors: int) -> str:
    """The settings that would help, with what they are."""
    train = config.train
    ways = [f"federation.cohort_size ({size})"] if size > 1 else []
    ways += [f"federation.actors ({actors})"] if actors > 1 else []
    rows = train.micro_batch or train.batch_size
    ways += [f"train.micro_batch ({rows} rows)", f"train.max_length ({train.max_length})"]
    more = [] if train.checkpointing else ["train.checkpointing=true"]
    more += ["model.quantise=4bit"] if config.model.quantise == "none" else []
    return ", ".join(ways) + (f", or set {' or '.join(more)}" if more else "")


def memory_of(config: RunConfig, scenario: Scenario, layout: Layout, says: Description, rank: int) -> Memory:
    """By the base that a client describes and the longest rows of the data. rank: of what a client trains."""
    if not says.shape or not says.machine:
        return Memory(0, Footprint())
    shape, work = Shape.from_json(says.shape), work_of(config)
    length, answer = longest(scenario, shape.picture, len(config.model.system.encode()))
    work = replace(work, length=min(work.length, length), answer=min(work.length, answer))
    where = Footprint.from_json(says.machine)
    return Memory(client_bytes(shape, layout, rank, work), where, not unfusable(config))


def longest(scenario: Scenario, picture: int, system: int) -> tuple[int, int]:
    """(tokens of a training row, of them in answers): not more than these, since a token is at least one byte.

    picture: tokens of a picture; system: bytes of the sentence before a question.
    """
    rows, answers = [0], [0]
    for example in _sample(scenario):
        turns = ((example.question, example.answer), *example.more)
        text = sum(len(part.encode()) for turn in turns for part in turn)
        answers.append(sum(len(answer.encode()) + 1 for _, answer in turns))
        rows.append(text + TEMPLATE * len(turns) + (picture if example.image is not None else 0))
    return max(rows) + system, max(answers)


def _sample(scenario: Scenario) -> Iterator[Example]:
    for task in scenario.tasks:
        rows = task.training
        for row in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED)).astype(int)):
            yield rows[int(row)]


def on_one_device(config: RunConfig, actors: int, where: Footprint) -> int:
    """How many of a grid's actors share the device of the one that was asked.

    They are spread evenly over this machine's GPUs. How a cluster places them is not known here: one is checked.
    """
    if config.federation.ray_address:
        return 1
    return math.ceil(actors / (max(1, machine.gpus()) if where.gpu else 1))


def cohort_of(grid: Grid) -> int:
    """How many clients of an exchange are trained together."""
    return int(getattr(grid, "cohort_size", 1))


def resize(grid: Grid, size: int) -> None:
    """Cohorts of at most this size from here on; a grid without cohorts is left as it is."""
    if isinstance(grid, InProcessGrid | RayGrid):
        grid.cohort_size = min(size, grid.cohort_size)
