"""Memory of a GPU that concurrent clients take at LLaVA-1.5-7B's shape: one frozen base, a cohort of them on it."""

import torch

from fedstrata.benchmarks.gpu_parts import FFN, LLAVA_7B, TOY, Load, card, device_of, jobs_of, random_base
from fedstrata.benchmarks.gpu_sides import Ours
from fedstrata.benchmarks.measure import Result
from fedstrata.client.footprint import peak
from fedstrata.client.model import BaseModel

CLIENTS = (1, 4, 16)
PEERS = 10.0  # GB per client: the least that peers publish (10 to 40)


def bench(quick: bool = False) -> Result:
    """GB that the process takes with 1, 4 and 16 clients in training, each with a batch of one row, per client."""
    device = device_of("gpu-memory", quick)
    shape, length = (TOY, 12) if quick else (LLAVA_7B, 650)
    base = random_base(shape, device, FFN)
    whole = {count: measured(base, Load(count, 2, 1, length, 4), shape.vocabulary) for count in CLIENTS}
    limits = {f"GB per client, {count} at once": size / count for count, size in whole.items()}
    return Result(
        name="gpu-memory",
        what=f"clients in one cohort, batch 1, {length} tokens, no checkpointing; hidden {shape.hidden}",
        clock="GB",
        ratios={},
        targets={f"GB per client, {count} at once": PEERS for count in CLIENTS[1:]},
        limits=limits,
        pairs=({f"{count} clients": size for count, size in whole.items()},),
        notes=(card(device), f"the base and everything else in it; peers publish {PEERS:.0f} to 40 GB per client"),
    )


def measured(base: BaseModel, load: Load, vocabulary: int) -> float:
    """The process's most memory on the device during a round, GB (10⁹ bytes)."""
    jobs = jobs_of(base, load, vocabulary)
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(base.device)
    Ours(base, jobs, load, load.clients).round()
    return peak(base.device) / 1e9
