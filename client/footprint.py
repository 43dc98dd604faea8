"""What a base model occupies, and what its device has left."""

from pathlib import Path
from typing import Any

import torch

from fedstrata.core import machine
from fedstrata.core.machine import Footprint

Ranges = list[tuple[int, int]]


def footprint(model: Any, device: torch.device) -> Footprint:
    """Of a loaded base model on its device."""
    sizes = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    base = sum(sizes.values())
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Footprint(torch.cuda.get_device_name(device), True, base, base, free, total)
    files = mapped()
    private = sum(size for start, size in sizes.items() if not any(low <= start < high for low, high in files))
    return Footprint("cpu", False, base, private, *machine.free_and_total(), machine.resident())


def peak(device: torch.device) -> int:
    """The most bytes that this process has had on the device."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else machine.peak()


def mapped() -> Ranges:
    """Where this process maps weight files: processes that map one file share its pages."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    spans = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
    return [(int(low, 16), int(high, 16)) for low, high in spans]
