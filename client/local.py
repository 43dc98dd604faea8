"""What a method's local half sees of the cohort that it trains."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fedstrata.client.lora import Cohort
from fedstrata.client.model import BaseModel
from fedstrata.core.config import TrainSection

if TYPE_CHECKING:
    from fedstrata.client.training import Job


@dataclass
class LocalContext:
    """One cohort of C clients while it trains; every list is in the cohort's order.

    Attributes:
        memories: what each client will remember; starts as what it remembered.
        open: context managers that stay open while the cohort trains, e.g. frozen adapters underneath.
    """

    base: BaseModel
    cohort: Cohort
    jobs: "Sequence[Job]"
    settings: TrainSection
    memories: list[dict[str, Any]] = field(init=False)
    open: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.memories = [dict(job.memory) for job in self.jobs]

    def __enter__(self) -> "LocalContext":
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def apart(self, named: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        """{name: [C, …]} as one mapping of arrays per client."""
        arrays = {name: value.detach().float().cpu().numpy() for name, value in named.items()}
        return [{name: value[row] for name, value in arrays.items()} for row in range(len(self.jobs))]
