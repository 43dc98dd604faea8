"""What memory there is: read from Linux itself, so that neither torch nor Ray need be imported to ask."""

import json
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

PROCESS = 310_000_000  # bytes a process costs by itself: measured, a Ray actor with torch and transformers imported


@dataclass(frozen=True)
class Footprint:
    """A client's base model and the device it lies on, in bytes; 0 where nobody knows.

    Attributes:
        device: its name, for people: cpu, or a GPU's.
        gpu: whether it is one.
        base: the base's parameters and buffers.
        private: those that another process on the same device would have once more: all on a GPU, on a CPU those that
            are not mapped from a file.
        free: what the device has left, with this base loaded.
        total: what it has.
        process: main memory of the process with the base, as far as it is in use.
    """

    device: str = "cpu"
    gpu: bool = False
    base: int = 0
    private: int = 0
    free: int = 0
    total: int = 0
    process: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Footprint":
        """Raises ValueError or TypeError for anything but the words of `to_json`."""
        told = Footprint(**json.loads(text))
        numbers = (told.base, told.private, told.free, told.total, told.process)
        if not all(isinstance(value, int) and value >= 0 for value in numbers):
            raise ValueError(f"footprint: must be whole numbers of at least 0, got {text}")
        return told


def free_and_total(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of memory that new processes here can have, and all there is: the least that machine and cgroup allow.

    Files that are cached count as free. (0, 0) on a system that does not say.

    root: where /proc and /sys are found; tests give their own.
    """
    free, total = _meminfo(root)
    for most, used in _cgroups(root):
        if 0 < most < total:
            total, free = most, min(free, max(0, most - used))
    return free, total


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def resident() -> int:
    """The memory that this process has now, in bytes; its peak where the system does not say."""
    try:
        return resource.getpagesize() * int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak()


def gpus(root: Path = Path("/")) -> int:
    """How many NVIDIA GPUs this process may use."""
    found = len(list((root / "proc/driver/nvidia/gpus").glob("*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else min(found, len([name for name in visible.split(",") if name.strip()]))


def _meminfo(root: Path) -> tuple[int, int]:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    found = {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return found.get("MemAvailable", 0), found.get("MemTotal", 0)


def _cgroups(root: Path) -> list[tuple[int, int]]:
    """(limit, used without cached files) of version 2 and of version 1, of the groups that this process is in."""
    told = []
    for folder, most, used, cached in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in _groups(root, folder):
            try:
                limit = int((group / most).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                told.append((limit, int((group / used).read_text()) - int(stat.get(cached, 0))))
            except (OSError, ValueError):  # not there, or "max": no limit
                continue
    return told


def _groups(root: Path, folder: str) -> list[Path]:
    """The process's own group and those around it; in a container its own is the root of what it sees."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    names = [line.split(":", 2)[2] for line in lines if line.startswith("0:") or ":memory:" in line]
    inner = [root / folder / name.strip("/") for name in names]
    return list(
        dict.fromkeys(
            [root / folder, *inner, *(up for path in inner for up in path.parents if up.is_relative_to(root / folder))]
        )
    )
