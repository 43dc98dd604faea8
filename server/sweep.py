"""`fedstrata sweep`: every cell an ordinary run, several at a time; what is there already is not run again.

A cell is finished when its result file is among the results or its run folder is completed, resumed when its folder has
begun, and tried once more when it fails. Cells share nothing but the machine, so a sweep grows over several sittings.
"""

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedstrata.core import durable
from fedstrata.core.errors import BadInput, FedstrataError, Interrupted
from fedstrata.core.metrics import AccuracyMatrix
from fedstrata.server.cells import Cell, present
from fedstrata.server.jobs import Hand, hands
from fedstrata.server.results import Result, load, result_json
from fedstrata.server.runfolder import CONFIG, SUMMARY, RunFolder, read_json
from fedstrata.server.worker import Answer, Job

COMPLETED, BEGUN, NOT_RUN, FAILED = "completed", "begun", "not run", "failed"
INTERRUPTED, BAD_INPUT = 75, 2
Tell = Callable[[str], None]


@dataclass(frozen=True)
class State:
    """Where a cell stands; `source`: its result file or its completed run folder."""

    cell: Cell
    status: str = NOT_RUN
    source: Path | None = None
    reason: str = ""

    def result(self) -> Result:
        """As `compare` reads it; a cell that is not completed has no scores."""
        if self.source is not None:
            return load(self.source)
        config = self.cell.config
        told = {"status": self.status, "seed": config.seed, "strategy": config.strategy.name}
        return Result(self.cell.name, self.cell.settings, told, AccuracyMatrix((), (), ()))


def look(cells: Sequence[Cell], folder: Path, results: Path | None) -> list[State]:
    """Where the cells stand, in their order.

    Raises:
        BadInput: a result file or a run folder of a cell's name holds another run.
    """
    known = [(path, _present(path)) for path in (sorted(results.glob("*.json")) if results else ())]
    return [_state(cell, folder / cell.name, known) for cell in cells]


def _present(path: Path) -> dict[str, Any]:
    """A result file's settings; empty for any other JSON file."""
    tree = read_json(path)
    return present(tree["config"]) if isinstance(tree, dict) and isinstance(tree.get("config"), dict) else {}


def _state(cell: Cell, folder: Path, known: Sequence[tuple[Path, Mapping[str, Any]]]) -> State:
    for path, now in known:
        if cell.matches(now):
            return State(cell, COMPLETED, path)
        if path.stem == cell.name:
            raise BadInput(f"{path}: holds a run with another config than the cell of this name; name other --results")
    if not (folder / CONFIG).exists():
        return State(cell)
    run = RunFolder(folder)
    if not cell.matches(present(run.config)):
        raise BadInput(f"{folder}: holds a run with another config than the cell of this name; name another --dir")
    done = run.has(SUMMARY) and run.summary.get("status") == COMPLETED
    return State(cell, COMPLETED, folder) if done else State(cell, BEGUN)


class Sweep:
    """Runs what is missing. `results`: a folder for one JSON per cell, or None."""

    def __init__(self, states: Sequence[State], folder: Path, results: Path | None, jobs: int, tell: Tell) -> None:
        self.states = {state.cell.name: state for state in states}
        self.folder, self.results, self.tell = folder, results, tell
        self.jobs, self.workers = jobs, list[Hand]()
        addresses = (state.cell.config.federation.ray_address for state in states)
        self.hands = partial(hands, folder, jobs, next(filter(None, addresses), ""))
        self.waiting: queue.SimpleQueue[State] = queue.SimpleQueue()
        self.stopped = threading.Event()

    def run(self) -> list[State]:
        """Where the cells stand at the end; `states` tells it at any time.

        Raises:
            Interrupted: Ctrl-C; the runs at work have committed, and the same command goes on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for state in self.states.values():
            if state.status != COMPLETED:
                self.waiting.put(state)
            elif state.source and state.source.is_dir():
                self.states[state.cell.name] = self._kept(state)
        if self.waiting.empty():
            return list(self.states.values())
        with self.hands() as self.workers, ThreadPoolExecutor(self.jobs) as pool:
            working = [pool.submit(self._work, worker) for worker in self.workers]
            try:
                wait(working, return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                raise Interrupted("the sweep was stopped; the same command goes on with it") from None
            finally:
                self._stop()
        for ended in working:
            ended.result()
        return list(self.states.values())

    def _stop(self) -> None:
        self.stopped.set()
        for worker in self.workers:
            worker.interrupt()

    def _work(self, worker: Hand) -> None:
        try:
            while not self.stopped.is_set():
                try:
                    state = self.waiting.get_nowait()
                except queue.Empty:
                    break
                self.states[state.cell.name] = self._kept(self._tried(state, worker))
        finally:
            worker.close()

    def _tried(self, state: State, worker: Hand) -> State:
        """A cell that fails is tried once more, from its last commit; bad input would be bad again."""
        name = state.cell.name
        for again in (False, True):
            self.tell(f"{name}: {'once more' if again else 'goes on' if state.status == BEGUN else 'begins'}")
            answer = worker.run(self._job(state.cell))
            if answer.code in (0, INTERRUPTED, BAD_INPUT) or self.stopped.is_set():
                break
            self.tell(f"{name}: failed: {answer.reason}")
        return self._ended(state, answer)

    def _job(self, cell: Cell) -> Job:
        folder = (self.folder / cell.name).resolve()
        words = (*cell.words, *(("federation.grid=inprocess",) if self.jobs > 1 else ()))
        return Job(words, str(folder), (folder / CONFIG).exists(), str(folder.with_name(f"{cell.name}.log")))

    def _ended(self, state: State, answer: Answer) -> State:
        folder = self.folder / state.cell.name
        if answer.code == 0:
            return replace(state, status=COMPLETED, source=folder)
        if answer.code == INTERRUPTED or self.stopped.is_set():
            return replace(state, status=BEGUN if (folder / CONFIG).exists() else NOT_RUN, reason=answer.reason)
        return replace(state, status=FAILED, reason=answer.reason)

    def _kept(self, state: State) -> State:
        """A completed cell's result file is written; the table is built from it."""
        if state.status != COMPLETED or state.source is None:
            self.tell(f"{state.cell.name}: {state.status}{': ' if state.reason else ''}{state.reason}")
            return state
        tree = result_json(state.source)
        self.tell(f"{state.cell.name}: completed, last {tree['summary'].get('last')}")
        if self.results is None:
            return state
        path = self.results / f"{state.cell.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_atomic(path, (json.dumps(tree, indent=1) + "\n").encode())
        return replace(state, source=path)


def check(states: Sequence[State]) -> None:
    """Raises `FedstrataError` unless every cell is completed; names those that are not, and why."""
    bad = [f"{state.cell.name} is {state.status}: {state.reason}" for state in states if state.status != COMPLETED]
    if bad:
        raise FedstrataError(f"{len(bad)} of {len(states)} cells: " + "; ".join(bad))
