"""A process that runs one cell of a sweep after another: libraries and base model stay loaded between them.

It reads jobs, one JSON object a line, from standard input and answers each with {code, reason}; it ends with its input.
SIGTERM interrupts the run that it is at, which can be resumed. It is killed when whoever started it dies.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from fedstrata.core.errors import FedstrataError
from fedstrata.server.supervise import bound

START = "from fedstrata.server.worker import serve; serve()"


@dataclass(frozen=True)
class Job:
    """The run that `words` give, a recipe first if there is one, or with `resume` one to go on with.

    What it prints goes to `log`.
    """

    words: tuple[str, ...]
    folder: str
    resume: bool
    log: str


@dataclass(frozen=True)
class Answer:
    """Exit code as of `fedstrata run`, and why."""

    code: int
    reason: str = ""


class Worker:
    """The other side: starts the process when there is something to do, and again when it died."""

    def __init__(self, log: Path, here: Path | None = None) -> None:
        """log: where warnings and tracebacks of the process go; here: the folder that it stands in, None: this one."""
        self.log, self.here = log, here
        self.process: subprocess.Popen[str] | None = None
        self.ended, self.lock = False, threading.Lock()

    def run(self, job: Job) -> Answer:
        """Waits until the job is done. A process that dies over it has failed it."""
        with self.lock:
            if self.ended:
                return Answer(75, "interrupted before it began")
            process = self._process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(job)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return Answer(**json.loads(line))
        return Answer(1, f"its process ended with code {process.wait()}; see {self.log}")

    def _process(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            self._close()
            with self.log.open("a", encoding="utf-8") as log:
                command, pipe = [sys.executable, "-c", START], subprocess.PIPE
                self.process = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=log, text=True, start_new_session=True, cwd=self.here
                )
        return self.process

    def interrupt(self) -> None:
        """The run that it is at commits and ends; so does the process."""
        with self.lock:
            self.ended = True
            if self.process and self.process.poll() is None:
                self.process.terminate()

    def close(self) -> None:
        """Ends the process once it has nothing to do."""
        if self.process and self.process.stdin:
            self.process.stdin.close()
            self.process.wait()
        self._close()

    def _close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout) if self.process else ():
            if pipe:
                pipe.close()


def serve() -> None:
    """The process itself. Standard output is for answers alone: whatever else is printed goes to standard error."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bound()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with suppress(KeyboardInterrupt):  # between two jobs there is nothing to commit
        for line in sys.stdin:
            answer = _do(Job(**json.loads(line)))
            print(json.dumps(asdict(answer)), file=answers, flush=True)
            if answer.code == 75:
                break


def _do(job: Job) -> Answer:
    from fedstrata.server import configure, launch

    with Path(job.log).open("a", encoding="utf-8") as log:
        console = Console(file=log, width=120)
        try:
            if job.resume:
                launch.resume(Path(job.folder), console)
            else:
                recipe, words = configure.split_recipe(job.words)
                launch.run(configure.resolve(recipe, [*words, f"run.dir={job.folder}"]), console)
        except FedstrataError as error:
            return Answer(error.exit_code, str(error))
        except KeyboardInterrupt:
            return Answer(75, "interrupted before it began")
        except Exception as error:
            traceback.print_exc(file=log)
            return Answer(1, f"{type(error).__name__}: {error}")
    return Answer(0)
