"""Sides of a measurement that are processes of their own: told line by line what to do, measured as a tree."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedstrata.benchmarks.measure import Cost
from fedstrata.server.supervise import tree

READY = "READY"


class Side:
    """A process that answers every line with a line `READY …`, seen from here."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process, self._log = process, log
        self._answer()

    def ask(self, line: str) -> str:
        """What it answers. Raises RuntimeError with the end of its log when it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def cost(self, line: str) -> Cost:
        """CPU seconds of the process tree, and the wall seconds that it answers."""
        before = tree_seconds(self._process.pid)
        wall = float(self.ask(line))
        return Cost(tree_seconds(self._process.pid) - before, wall)

    def shares(self, line: str) -> dict[str, float]:
        """CPU seconds of its own process, Ray's raylet and all actors."""
        before = _shares(self._process.pid)
        self.ask(line)
        return {kind: spent - before[kind] for kind, spent in _shares(self._process.pid).items()}

    def peak(self) -> float:
        """MB: the peaks of resident memory of its own process and of all Ray actors below it, added up."""
        return peak_memory(self._process.pid)

    def _answer(self) -> str:
        for line in self._process.stdout or ():
            if line.startswith(READY):
                return line.removeprefix(READY).strip()
        ended = self._process.wait()
        raise RuntimeError(f"a side of the benchmark ended with {ended}: {self._log.read_text()[-2000:]}")


@contextmanager
def side(module: str, words: list[str], log: Path) -> Iterator[Side]:
    """Starts `python -m module words`; end of input ends it."""
    with log.open("w") as file:
        command = [sys.executable, "-m", module, *words]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True)
        try:
            yield Side(process, log)
        finally:
            process.communicate()


def tree_seconds(root: int) -> float:
    """CPU seconds so far of a process and its live descendants, threads that have ended included (Linux; in ticks)."""
    return sum(_ticks(Path(f"/proc/{pid}/stat")) for pid in tree(root)) / os.sysconf("SC_CLK_TCK")


def _shares(root: int) -> dict[str, float]:
    found = dict.fromkeys(("server", "raylet", "actors"), 0.0)
    for pid in tree(root):
        name = _read(Path(f"/proc/{pid}/cmdline"))
        kind = "server" if pid == root else "actors" if name.startswith("ray::Worker") else "raylet"
        if kind != "raylet" or name.partition("\0")[0].endswith("/raylet"):
            found[kind] += _ticks(Path(f"/proc/{pid}/stat")) / os.sysconf("SC_CLK_TCK")
    return found


def peak_memory(root: int) -> float:
    """MB: peaks of resident memory of a process and the Ray actors below it (Linux), added up."""
    names = {pid: _read(Path(f"/proc/{pid}/cmdline")) for pid in tree(root)}
    chosen = [pid for pid, name in names.items() if pid == root or name.startswith("ray::Worker")]
    lines = [line for pid in chosen for line in _read(Path(f"/proc/{pid}/status")).splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def _ticks(path: Path) -> int:
    return sum(int(word) for word in _read(path).rpartition(")")[2].split()[11:13])  # user and system


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended meanwhile
        return ""
