"""The command above a run: it does nothing but wait, and so can tell how the run ended when the run itself cannot.

Ray ends a process from within when its raylet dies, and a machine without memory ends it from outside: no `finally`
is reached then. So `fedstrata run` and `resume` fork before anything large is imported. The child is the run, and says
what it knows of its end through a pipe; the parent passes signals on, ends whatever processes are left, and ends with
the code that it was told. Where it was told none, it writes what is true: interrupted, and how to go on.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from fedstrata.core.errors import FedstrataError, Interrupted
from fedstrata.server import supervise

ADOPT_ORPHANS = 36  # of prctl: Ray's daemons become our children when the run that started them is gone
ENDING = (signal.SIGINT, signal.SIGTERM)
ONCE = 1.0  # seconds in which one signal that comes again is the same one, from the terminal and from the command

_said: int | None = None  # the pipe's end in the run; None: nobody listens
_signalled = float("-inf")


def begin() -> None:
    """Returns in the run alone. Elsewhere than on Linux, and in a process with other threads, which a fork would lose,
    there is no command above it.

    Raises:
        SystemExit: in the command, with the code that the run told.
        Interrupted: in the command; the run ended without a word.
        FedstrataError: the same, before it had a folder.
    """
    global _said
    if sys.platform != "linux" or len(list(Path("/proc/self/task").iterdir())) > 1:
        return
    heard, said = os.pipe()
    adopt_orphans()
    command = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until each has its own answer to them
    run = os.fork()
    if run:
        os.close(said)
        _command(run, heard)
    os.close(heard)
    supervise.bound()
    if os.getppid() != command:  # it was killed before that
        os._exit(1)
    _said = said
    _answer(_heed)


def tell(**facts: str | int) -> bool:
    """In the run: its `folder`, the `reason` why it will end, its exit `code`. Whether a command listens."""
    if _said is None:
        return False
    os.write(_said, json.dumps(facts).encode() + b"\n")
    return True


def adopt_orphans() -> None:
    """From here on, a process below this one whose parent ends becomes a child of this one."""
    ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1)


def _answer(handler: Any) -> None:
    """Signals that were ignored stay so."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def _heed(number: int, frame: FrameType | None) -> None:
    global _signalled
    now = time.monotonic()
    if now - _signalled > ONCE:
        _signalled = now
        raise KeyboardInterrupt


def _command(run: int, heard: int) -> None:
    """Waits for the run, and ends as it did."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(run, number)

    _answer(pass_on)
    code = _wait(run)
    end_what_is_left()
    facts: dict[str, Any] = {}
    with open(heard, encoding="utf-8") as lines:
        for line in lines:
            facts |= json.loads(line)
    if "code" in facts:
        sys.exit(facts["code"])
    _untold(facts, f"signal {-code}" if code < 0 else f"exit code {code}")


def _wait(run: int) -> int:
    """The run's exit code, or a signal's negative number; orphans that end before it are buried."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == run:
            return os.waitstatus_to_exitcode(status)


def end_what_is_left() -> int:
    """Ends all processes below this one, orphans too, and waits for them; how many there were."""
    found = len(supervise.tree(os.getpid())) - 1
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in supervise.tree(os.getpid())[1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)
    return found


def _untold(facts: dict[str, Any], how: str) -> None:
    """Raises what is true of a run that ended without a word, and writes it into the run folder."""
    from rich.console import Console

    from fedstrata.server import ending

    Console().show_cursor()  # the live bars had hidden it
    what = facts.get("reason") or f"the run's process ended without a word ({how}), as by Ray or for lack of memory"
    if "folder" not in facts:
        raise FedstrataError(f"{what}; the run has not begun")
    folder = Path(facts["folder"])
    try:
        ending.interrupted(folder)
    except (FedstrataError, OSError) as error:
        what += f"; summary.json could not be written ({error})"
    raise Interrupted(f"{what}; the last commit stands; to go on from it: fedstrata resume {folder}")
