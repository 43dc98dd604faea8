"""Training within the memory there is: a cohort that does not fit is halved until it does.

A client's result does not depend on who shares its cohort, but for rounding; so what was lost is only time.
"""

import gc
from collections.abc import Sequence
from typing import Any

import torch

from fedstrata.client import training
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, Trained
from fedstrata.core.errors import BadInput

SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")  # as torch words it


def train_within(base: BaseModel, jobs: Sequence[Job], *args: Any, **kwargs: Any) -> tuple[list[Trained], int]:
    """`client.training.train`, and the largest cohort that it took: all the jobs, or fewer where memory ran out.

    Raises:
        BadInput: one client alone does not fit; and whatever `train` raises.
    """
    size, done = len(jobs), list[Trained]()
    while len(done) < len(jobs):
        part = jobs[len(done) : len(done) + size]
        trained = _attempt(base, part, *args, **kwargs)
        if trained is not None:
            done += trained
            continue
        _free()
        if len(part) == 1:
            raise BadInput(_alone(base))
        size = (len(part) + 1) // 2
    return done, size


def _attempt(base: BaseModel, jobs: Sequence[Job], *args: Any, **kwargs: Any) -> list[Trained] | None:
    """None when memory ran out. Its traceback, which holds the tensors, is gone when this returns."""
    try:
        return training.train(base, jobs, *args, **kwargs)
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        return None


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _alone(base: BaseModel) -> str:
    rule = "one client alone does not fit into the memory of its device"
    ways = "lower train.micro_batch (or train.batch_size), or set train.checkpointing=true"
    return f"train.micro_batch: {rule} ({base.device}); {ways}"
