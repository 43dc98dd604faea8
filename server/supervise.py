"""Processes that are started again when they end, and that end with whoever started them."""

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FIRST, MOST = 1.0, 30.0  # seconds until a process is started again; doubled each time it ends early
STEADY = 60.0  # seconds after which one counts as having run
GRACE = 15.0  # seconds that a process has to end
DIE_WITH_PARENT = 1  # of prctl


@dataclass(frozen=True)
class Job:
    """One process: its name, its command, its environment and the file that gets what it says."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path


class Child:
    """A job's process, as often as it takes."""

    def __init__(self, job: Job) -> None:
        self.job, self.starts, self._wait, self._next = job, 0, FIRST, 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._since, self.before = 0.0, 0  # where the log stood when it was last started

    @property
    def pid(self) -> int | None:
        """None while it is not running."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def tend(self, ended: Callable[["Child", int], None]) -> None:
        """Starts it when it is time to; `ended` is told of every end with the exit code."""
        now = time.monotonic()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            self._process = None
            steady = now - self._since > STEADY
            self._wait = FIRST if steady else min(MOST, 2 * self._wait)
            self._next = now + (FIRST if steady or self.starts == 1 else self._wait / 2)
            ended(self, code)
        if now >= self._next:
            self._start(now)

    def _start(self, now: float) -> None:
        self.job.log.parent.mkdir(parents=True, exist_ok=True)
        self.before = self.job.log.stat().st_size if self.job.log.exists() else 0
        with self.job.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.job.command,
                env=dict(self.job.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=bound,
            )
        self._since, self.starts = now, self.starts + 1

    def said(self) -> str:
        """What it has written since it was last started."""
        with self.job.log.open("rb") as log:
            log.seek(self.before)
            return log.read().decode(errors="replace")

    def end(self) -> None:
        """Asks it to end, and ends it if it does not."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def bound() -> None:
    """In the child: it is killed when its parent dies, however that dies."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def tend(
    children: Sequence[Child], stop: threading.Event, ended: Callable[[Child, int], None], turn: Callable[[], None]
) -> None:
    """Keeps all of them running until `stop` is set; calls `turn` in every turn. Ends the last one first."""
    try:
        while not stop.wait(0.2):
            for child in children:
                child.tend(ended)
            turn()
    finally:
        for child in reversed(children):
            child.end()


def tree(root: int) -> list[int]:
    """A process and its descendants (Linux)."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parent = path.read_text(errors="replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def alive(pid: int) -> bool:
    """Whether a process with this id is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
