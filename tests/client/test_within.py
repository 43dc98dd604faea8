"""Training within the memory there is."""

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedstrata.client import training
from fedstrata.client.model import BaseModel
from fedstrata.client.training import Job, Trained
from fedstrata.client.within import ran_out, train_within
from fedstrata.core.adapters import fresh
from fedstrata.core.config import LoraSection, ModelSection, TrainSection
from fedstrata.core.errors import BadInput
from fedstrata.scenarios.stream import Example

SETTINGS = TrainSection(batch_size=2, local_epochs=1)


@pytest.fixture(scope="module")
def base(llava: Path) -> BaseModel:
    torch.set_num_threads(1)
    return BaseModel(ModelSection(name=str(llava)), LoraSection())


def jobs(base: BaseModel, count: int) -> list[Job]:
    rows = [Example(str(row), f"what is {row}?", ("red", "blue")[row % 2]) for row in range(12)]
    return [Job(rows[: 3 + client], fresh(base.layout, 4, 0), client) for client in range(count)]


def limited(monkeypatch: pytest.MonkeyPatch, most: int, error: BaseException) -> list[int]:
    """From here on `train` fails for more than `most` clients; the sizes that it was called with."""
    real, sizes = training.train, list[int]()

    def train(base: BaseModel, part: Sequence[Job], *args: Any, **kwargs: Any) -> list[Trained]:
        sizes.append(len(part))
        if len(part) > most:
            raise error
        return real(base, part, *args, **kwargs)

    monkeypatch.setattr(training, "train", train)
    return sizes


@pytest.mark.parametrize(
    ("most", "called", "size"),
    [(5, [5], 5), (4, [5, 3, 2], 3), (2, [5, 3, 2, 2, 1], 2), (1, [5, 3, 2, 1, 1, 1, 1, 1], 1)],
)
def test_a_cohort_that_does_not_fit_is_halved_and_its_clients_get_the_same(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, most: int, called: list[int], size: int
) -> None:
    whole = training.train(base, jobs(base, 5), SETTINGS, 2.0)
    sizes = limited(monkeypatch, most, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    parts, took = train_within(base, jobs(base, 5), SETTINGS, 2.0)
    assert (sizes, took) == (called, size)
    assert [part.steps for part in parts] == [one.steps for one in whole]
    for one, part in zip(whole, parts, strict=True):
        np.testing.assert_allclose(part.flat, one.flat, atol=2e-4)
        assert not np.array_equal(part.flat, jobs(base, 1)[0].flat)


def test_one_client_that_does_not_fit_ends_it_and_says_what_to_lower(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 0, MemoryError())
    with pytest.raises(BadInput, match=r"train\.micro_batch.*train\.batch_size.*train\.checkpointing"):
        train_within(base, jobs(base, 2), SETTINGS, 2.0)


def test_other_errors_are_no_reason_to_try_again(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = limited(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        train_within(base, jobs(base, 4), SETTINGS, 2.0)
    assert sizes == [4]


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 12"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: BaseException, is_it: bool) -> None:
    assert ran_out(error) is is_it


def test_what_the_failed_attempt_held_is_free_before_the_next_one(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Held:
        alive = 0

        def __init__(self) -> None:
            Held.alive += 1

        def __del__(self) -> None:
            Held.alive -= 1

    seen = []

    def train(base: BaseModel, part: Sequence[Job], *args: Any) -> list[Trained]:
        seen.append(Held.alive)
        held = Held()
        held.me = held  # type: ignore[attr-defined]  # a cycle, as autograd graphs may have
        if len(part) > 1:
            raise torch.OutOfMemoryError
        return [Trained(part[0].flat, 0.0, 1, 0.0)]

    monkeypatch.setattr(training, "train", train)
    train_within(base, jobs(base, 2), SETTINGS, 2.0)
    assert seen[:2] == [0, 0]


REAL = """
    import resource, sys
    import numpy as np, torch
    torch.set_num_threads(1)
    from fedstrata.client import batching
    from fedstrata.client.model import BaseModel
    from fedstrata.client.training import Job, train
    from fedstrata.client.within import train_within
    from fedstrata.core.adapters import fresh
    from fedstrata.core.config import LoraSection, ModelSection, TrainSection
    from fedstrata.scenarios.stream import Example

    batching.CACHED = 2**60  # all clients at once: in groups, as a CPU would take them, they fit
    base = BaseModel(ModelSection(device="cpu"), LoraSection())
    rows = [Example(str(row), "what colour is the shape? " * 30, "red") for row in range(8)]
    settings = TrainSection(batch_size=8, local_epochs=1, max_length=4000)
    jobs = [Job(rows, fresh(base.layout, 8, 0), client) for client in range(8)]
    alone = train(base, jobs[:1], settings, 2.0)  # everything that is loaded late is there now
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[1]), held + int(sys.argv[1])))
    done, size = train_within(base, jobs, settings, 2.0)
    print(size, len(done), float(np.abs(done[0].flat - alone[0].flat).max()))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how large the process is")
def test_a_real_allocation_that_fails_is_recovered_from() -> None:
    """8 clients need about 390 MB, and the process may grow by 250 MB."""
    code = textwrap.dedent(REAL)
    done = subprocess.run([sys.executable, "-c", code, "250000000"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    size, count, far = done.stdout.split()
    assert (int(size) < 8, int(count)) == (True, 8)
    assert float(far) < 2e-4
