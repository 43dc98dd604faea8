"""How many actors a simulation gets, and what each takes of the machines it runs on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedstrata.core.errors import BadInput

GRAIN = 10_000  # Ray counts fractions of a resource in ten-thousandths


@dataclass(frozen=True)
class Wanted:
    """What the config says of the actors.

    Attributes:
        actors: how many; 0: one per GPU of the cluster that is joined, without GPUs one per core of it.
        local: how many where Ray is started on this machine.
        threads: torch threads of an actor.
        device: auto | cpu | cuda.
        address: of the cluster to join; empty: Ray is started on this machine.
    """

    actors: int = 0
    local: int = 1
    threads: int = 1
    device: str = "cpu"
    address: str = ""


def place(wanted: Wanted, found: Mapping[str, float]) -> tuple[int, dict[str, Any]]:
    """The number of actors and the Ray options of each. `found`: the cluster's resources.

    Actors are spread over the nodes. With GPUs, each actor has one for itself, or where there are more actors than
    GPUs an equal part of one. Cores are counted in a joined cluster only, which others may use too.

    Raises:
        BadInput: a GPU is asked for and there is none.
    """
    gpus = int(found.get("GPU", 0)) if wanted.device != "cpu" else 0
    if wanted.device == "cuda" and not gpus:
        where = f"in the cluster at {wanted.address}" if wanted.address else "on this machine"
        raise BadInput(f"model.device: is cuda, but Ray finds no GPU {where}")
    cores = int(found.get("CPU", 0)) // wanted.threads
    count = (wanted.actors or gpus or max(1, cores)) if wanted.address else wanted.local
    cpus = wanted.threads if wanted.address else 0
    share = math.floor(GRAIN / math.ceil(count / gpus)) / GRAIN if gpus else 0
    return count, {"num_cpus": cpus, "num_gpus": share, "scheduling_strategy": "SPREAD", "max_restarts": 0}
