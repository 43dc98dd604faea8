"""What four workers on one base cost: they map the base's file, so its pages are in memory once."""

import ctypes
import hashlib
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from fedstrata.benchmarks.measure import Result

WORKERS = 4
LIMIT = "pss growth / one base"
COPIES = "construct + load_state_dict"
TRAINED = "trained adapter, all workers and both ways, sha256"
FULL: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
SMALL: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}


@dataclass(frozen=True)
class Growth:
    """Bytes by which the workers' summed PSS grew, and what of it the allocator would give back; their adapters."""

    bytes: int
    trimmed: int
    digests: frozenset[str]


def bench(quick: bool = False) -> Result:
    """Growth of the summed PSS of four workers from loading one base and one training step. Linux only.

    PSS counts a page that n processes share as 1/n of a page in each. A worker has trained the embedded base before,
    so that imports and kernels do not count.
    """
    with tempfile.TemporaryDirectory() as name:
        size = write_base(Path(name), SMALL if quick else FULL, 2_000 if quick else 32_000)
        repeats, workers = (1, 2) if quick else (5, WORKERS)
        rounds = [{way: growth(Path(name), way, workers) for way in ("mapped", COPIES)} for _ in range(repeats)]
    digests = frozenset[str]().union(*(one.digests for round_ in rounds for one in round_.values()))
    if len(digests) != 1:
        raise AssertionError(f"workers trained different adapters from equal weights: {sorted(digests)}")
    grown = {way: [round_[way].bytes for round_ in rounds] for way in ("mapped", COPIES)}
    trimmed = [round_["mapped"].trimmed for round_ in rounds]
    return Result(
        name="memory",
        what=f"{workers} workers on a base of {size / 1e6:.0f} MB: load, hash, one step of training, checkpointed",
        clock="MB",
        ratios={COPIES: median(c / m for c, m in zip(grown[COPIES], grown["mapped"], strict=True))},
        targets={LIMIT: 1.15},
        limits={LIMIT: median(grown["mapped"]) / size},
        pairs=tuple({way: round(one.bytes / 1e6, 1) for way, one in round_.items()} for round_ in rounds),
        equal={TRAINED: next(iter(digests))},
        notes=(
            f"{median(trimmed) / size:.2f} bases once the allocators give back what they keep for the next step",
            f"{median(grown[COPIES]) / size:.2f} bases by {COPIES}",
        ),
    )


def write_base(folder: Path, shape: dict[str, Any], vocabulary: int) -> int:
    """A random Llama with the embedded base's tokenizer; the bytes of its weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from fedstrata.client.model import TINY

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **shape, **ids))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def growth(folder: Path, way: str, workers: int) -> Growth:
    """Starts the workers, lets them load `folder` and train, and ends them."""
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(workers)]
    started = [context.Process(target=work, args=(there, str(folder), way)) for _, there in ends]
    for worker, (_, there) in zip(started, ends, strict=True):
        worker.start()
        there.close()  # the worker's alone, so that its death is seen
    pids, here = [int(worker.pid or 0) for worker in started], [end for end, _ in ends]
    try:
        told: list[list[Any]] = []
        sizes = []
        for _ in range(3):  # warm, trained, trimmed
            told.append([end.recv() for end in here])
            sizes.append(sum(map(pss, pids)))
            for end in here:
                end.send(None)
        return Growth(sizes[1] - sizes[0], sizes[2] - sizes[0], frozenset(told[1]))
    finally:
        for worker in started:
            worker.join(60)
            worker.kill()


def work(end: Connection, folder: str, way: str) -> None:
    """A worker: trains the embedded base, waits, loads and trains `folder`, waits, trims, waits."""
    import torch

    from fedstrata.core.config import ModelSection

    torch.set_num_threads(1)
    step(ModelSection(), None)
    wait(end, "warm")
    digest, base = step(ModelSection(name=folder), None if way == "mapped" else copied)
    wait(end, digest)
    ctypes.CDLL(None).malloc_trim(0)
    wait(end, base.hash)


def step(section: Any, opener: Callable[[Any], Any] | None) -> tuple[str, Any]:
    """Loads and hashes a base, trains one step of one client on it: (SHA-256 of the adapter, the base, kept alive)."""
    from fedstrata.client import model
    from fedstrata.client.training import Job, train
    from fedstrata.core.adapters import fresh
    from fedstrata.core.config import LoraSection, TrainSection
    from fedstrata.scenarios.stream import Example

    with nullcontext() if opener is None else mock.patch.object(model, "open_base", opener):
        base = model.BaseModel(section, LoraSection(rank=4, targets=["q_proj", "v_proj"]))
    base.hash  # noqa: B018  # every page of the base is read
    job = Job([Example("one", "what colour?", "red")], fresh(base.layout, 4, 0), seed=0)
    done = train(base, [job], TrainSection(local_epochs=1, batch_size=1, checkpointing=True), 2.0)[0]
    return hashlib.sha256(done.flat.tobytes()).hexdigest(), base


def copied(section: Any) -> tuple[Any, Any]:
    """The usual way: a model is made, then filled from a checkpoint."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(section.name, attn_implementation=section.attention)
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(load_file(Path(section.name) / "model.safetensors"), strict=False)
    model.tie_weights()
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(section.name)


def wait(end: Connection, word: str) -> None:
    """Tells the parent, which measures before it answers."""
    end.send(word)
    end.recv()


def pss(pid: int) -> int:
    """Proportional set size in bytes."""
    if not sys.platform.startswith("linux"):
        raise OSError("the proportional set size is read from /proc, which only Linux has")
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
