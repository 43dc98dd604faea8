"""What a GPU does at best, before anything is asked of it: cost of an operation, its matrix peak, memory per token."""

import time
from statistics import median

import torch

from fedstrata.benchmarks.gpu_parts import (
    FFN,
    LLAVA_7B,
    TOY,
    Load,
    card,
    device_of,
    dtype_of,
    jobs_of,
    random_base,
    synchronise,
)
from fedstrata.benchmarks.gpu_sides import Ours, activation_bytes
from fedstrata.benchmarks.measure import Result, cost, raw

OP, PEAK = "µs per eager operation", "matrix peak, TFLOP/s"
SHARE, BYTES = "share of it in training", "activation bytes per token"


def bench(quick: bool = False) -> Result:
    """Limits are facts without targets; the other `gpu-` benchmarks are read by them."""
    device = device_of("gpu", quick)
    shape, load = (TOY, Load(1, 2, 2, 12, 4)) if quick else (LLAVA_7B, Load(1, 4, 4, 650))
    base = random_base(shape, device, FFN)
    jobs = jobs_of(base, load, shape.vocabulary)
    peak = matrix_peak(device, 64 if quick else 8192)
    ours, kept = Ours(base, jobs, load, 1), activation_bytes(base, jobs[0], load.settings)
    ours.round()
    rounds = [{"a training step": cost(ours.round)} for _ in range(5)]
    seconds = median(pair["a training step"].wall for pair in rounds)
    weights = sum(parameter.numel() for name, parameter in base.backbone.named_parameters() if "embed" not in name)
    share = 4 * weights * load.tokens / seconds / 1e12 / peak  # forward and gradients of activations; none of weights
    facts = {OP: operation_microseconds(device, 200 if quick else 5000), PEAK: peak, SHARE: share, BYTES: kept}
    return Result(
        name="gpu",
        what=f"single operations, square {dtype_of(device)} matrices, one client's step of {load.tokens} tokens",
        clock="wall",
        ratios={},
        targets={},
        limits=facts,
        pairs=raw(rounds),
        notes=(card(device), f"{load.words()}, through {weights / 1e9:.3g} G weights"),
    )


def operation_microseconds(device: torch.device, count: int) -> float:
    """Wall time of one small operation in a long queue of them."""
    value = torch.zeros(8, device=device)
    for _ in range(2):  # the first time warms up
        synchronise(device)
        began = time.perf_counter()
        for _ in range(count):
            value.add_(1.0)
        synchronise(device)
        spent = time.perf_counter() - began
    return spent / count * 1e6


def matrix_peak(device: torch.device, size: int) -> float:
    """TFLOP/s of the best of 10 products of two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype_of(device)) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        began = time.perf_counter()
        torch.mm(a, b)
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12
