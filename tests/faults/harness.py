"""Real runs, killed at any moment and resumed until they are done: is a committed round ever lost, is a bit different?

A trial forks a run (this process has imported everything and loaded the base), sends SIGKILL to all of its processes
at a seeded random time, resumes, and so on. `acknowledged` is what the run itself was told is on the disk. With a
power cut, what had not been flushed is gone, too: un-flushed data are halved or emptied, and any of the renames and
removals since a folder's last flush are undone. SIGKILL alone leaves the page cache and can never show a lacking flush.

A `fault` hits one of Ray's processes instead, once: the run must go on, or end by itself and be resumed.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from fedstrata.client.world import scenario_of
from fedstrata.core import durable
from fedstrata.core.errors import Interrupted
from fedstrata.server import checkpoint, configure, guard, launch, supervise

STEPS = ("put", "sync_file", "rename", "sync_folder", "remove")
POINTS = tuple((step, when, role) for step in STEPS for when in ("before", "after") for role in ("blob", "manifest"))
FAULTS = {  # process that is hit (its name begins so), signal, config that the run needs to live with it
    "raylet": ("raylet", signal.SIGKILL, ()),
    "actor": ("ray::Worker", signal.SIGKILL, ()),
    "stop": ("ray::Worker", signal.SIGSTOP, ("federation.cohort_timeout=90",)),
}
PATIENCE = 300.0  # seconds in which a run must end after a fault
BREAKS = {"fsync": "sync_file", "rename": "sync_folder"}  # what is left out: the flush of the data or of the rename
DONE = "done"
HOW_TO_GO_ON = "; the last commit stands; to go on from it: fedstrata resume"


@dataclass(frozen=True)
class Plan:
    """How a trial's processes are disturbed.

    Attributes:
        kills: SIGKILLs at random times; afterwards the run may end.
        power_cut: every kill takes what was not flushed along.
        leave_out: "fsync" or "rename": the flush that is removed from the product, to see that the harness can fail.
        points: crash points; each breaks off every commit once, or commit n the n-th of them alone (`rotate`).
        fault: "raylet", "actor" or "stop": which of Ray's processes is killed (stopped) instead of all of them.
    """

    kills: int = 3
    power_cut: bool = False
    leave_out: str = ""
    points: tuple[tuple[str, str, str], ...] = ()
    rotate: bool = False
    fault: str = ""


@dataclass
class Trial:
    """What came of one trial.

    Attributes:
        lost: acknowledged commits that were not there after a kill.
        exits: how every process ended that ended by itself; after a fault more than one: the run was resumed.
        told: whether a run that a fault ended said so and how to go on, and left a summary that says interrupted.
        said: what that was: by the run, or by the command above it.
        left: processes of the run that were still there when its command had ended.
    """

    seed: int
    grid: str
    kills: int = 0
    lost: int = 0
    ended: str = ""
    same: bool = False
    seconds: float = 0.0
    commits_at_kills: list[int] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    told: bool | None = None
    said: str = ""
    left: int = 0

    @property
    def good(self) -> bool:
        return self.ended == DONE and self.same and not self.lost and not self.left and self.told is not False


class Place:
    """One trial's files: the run folder, and beside it what the harness itself remembers."""

    def __init__(self, root: Path) -> None:
        self.run, self.log = root / "run", root / "log.txt"
        self.acks, self.journal, self.saved = root / "acks", root / "journal", root / "saved"
        self.points = root / "points"
        for folder in (root, self.saved, self.points):
            folder.mkdir(parents=True, exist_ok=True)

    def acknowledged(self) -> int:
        """The number of the last commit that the run was told is safe."""
        return int(self.acks.stat().st_size) if self.acks.exists() else 0

    def summary(self) -> dict[str, Any]:
        """Empty while the run goes on."""
        try:
            return dict(json.loads((self.run / "summary.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    @property
    def completed(self) -> bool:
        return self.summary().get("status") == "completed"


def config(words: Sequence[str], folder: Path) -> Any:
    return configure.resolve("fcit-mini-short", ["train.local_epochs=1", *words, f"run.dir={folder}"])


def warm(words: Sequence[str]) -> None:
    """Loads base and scenario, which forks then share."""
    prepared = launch.prepare(config([*words, "federation.grid=inprocess"], Path("unused")))
    scenario_of(prepared.config_json)
    prepared.close()


def start(place: Place, words: Sequence[str], plan: Plan) -> int:
    """Forks a process (of its own group) that runs or resumes, as the command does; returns its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        guard.begin()
        _disturb(place, plan)
        code = _work(place, words)
        guard.tell(code=code)
    except SystemExit as told:
        code = int(told.code or 0)
    except launch.FedstrataError as error:
        print(f"{type(error).__name__}: {error}")
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        guard.tell(code=code)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _work(place: Place, words: Sequence[str]) -> int:
    quiet = Console(quiet=True)
    try:
        if (place.run / "config.yaml").exists():
            launch.resume(place.run, quiet, words=words)
        else:
            launch.run(config(words, place.run), quiet)
    except launch.FedstrataError as error:
        print(f"{type(error).__name__}: {error}")
        return error.exit_code
    return 0


def _disturb(place: Place, plan: Plan) -> None:
    """Puts the harness under the product's file layer, in the forked process."""
    if plan.leave_out:
        setattr(durable, BREAKS[plan.leave_out], lambda *_: None)
    if plan.power_cut:
        _record(place, plan)
    acknowledge, write = os.open(place.acks, os.O_WRONLY | os.O_CREAT), checkpoint.write

    def acknowledged(folder: Path, commit: checkpoint.Commit, keep_for_good: bool = False) -> None:
        write(folder, commit, keep_for_good)
        os.ftruncate(acknowledge, commit.number)  # the file's length is the number: it cannot be torn

    checkpoint.write = acknowledged
    for step in {step for step, _, _ in plan.points}:
        setattr(durable, step, _breaking(place, plan, step))


def _breaking(place: Place, plan: Plan, step: str) -> Callable[..., None]:
    """A step of the file layer that ends the process once per commit and point."""
    real = getattr(durable, step)

    def broken(*arguments: Any) -> None:
        role = _role(Path(getattr(arguments[-1], "name", "") if step == "rename" else _path(arguments[0])))
        number = place.acknowledged() + 1
        for when in ("before", "after"):
            point = (step, when, role)
            mine = plan.points[number % len(plan.points)] == point if plan.rotate else point in plan.points
            mark = place.points / f"{number}-{'-'.join(point)}"
            if mine and not mark.exists():
                if when == "after":
                    real(*arguments)
                mark.touch()
                os.kill(os.getppid(), signal.SIGKILL)  # the command above the run
                os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)

    return broken


def _path(argument: Any) -> str:
    return str(argument.name) if hasattr(argument, "fileno") else str(argument)


def _role(path: Path) -> str:
    """Which file of a commit a path is; its folder counts as its manifest."""
    if ".safetensors" in path.name:
        return "blob"
    return "manifest" if path.name.strip(".")[:6].isdecimal() or path.name == "checkpoints" else "other"


# the power cut: what the file layer did is written down, and undone as far as it was not flushed


def _record(place: Place, plan: Plan) -> None:
    journal = os.open(place.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    real = {step: getattr(durable, step) for step in STEPS}

    def note(**fields: Any) -> None:
        os.write(journal, json.dumps(fields).encode() + b"\n")

    def keep(path: Path) -> str:
        """A copy of what stands at a path now, outside of the run folder."""
        if not path.exists():
            return ""
        copy = place.saved / f"{os.getpid()}-{time.monotonic_ns()}"
        shutil.copyfile(path, copy)
        return str(copy)

    def put(file: Any, data: bytes) -> None:
        note(op="put", path=file.name)
        real["put"](file, data)

    def sync_file(file: Any) -> None:
        real["sync_file"](file)
        if plan.leave_out != "fsync":
            note(op="sync", path=file.name)

    def rename(temporary: Path, path: Path) -> None:
        note(op="rename", source=str(temporary), path=str(path), old=keep(path))
        real["rename"](temporary, path)

    def sync_folder(folder: Path) -> None:
        real["sync_folder"](folder)
        if plan.leave_out != "rename":
            note(op="flush", path=str(folder))

    def remove(path: Path) -> None:
        note(op="remove", path=str(path), old=keep(path))
        real["remove"](path)

    for step in (put, sync_file, rename, sync_folder, remove):
        setattr(durable, step.__name__, step)


def cut_power(place: Place, rng: random.Random) -> None:
    """Leaves on the disk what a machine may find after a power cut."""
    pending: list[dict[str, Any]] = []
    loose: set[str] = set()  # files whose data were never flushed
    for event in _journal(place.journal):
        path = event["path"]
        if event["op"] == "put":
            loose.add(path)
        elif event["op"] == "sync":
            loose.discard(path)
        elif event["op"] == "flush":
            pending = [before for before in pending if str(Path(before["path"]).parent) != path]
        else:
            pending.append(event)
            if event["op"] == "rename":
                (loose.add if event["source"] in loose else loose.discard)(path)
                loose.discard(event["source"])
    chance = rng.choice((0.0, 0.5, 1.0))  # none, any or all of what was not flushed survives
    for event in reversed(pending):
        if rng.random() >= chance:
            _undo(event, loose)
    for name in loose:
        if Path(name).exists():
            size = Path(name).stat().st_size
            os.truncate(name, rng.choice((0, size // 2)))
    place.journal.unlink(missing_ok=True)


def _journal(path: Path) -> Iterator[dict[str, Any]]:
    """The events; the last line may be torn."""
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        yield json.loads(line)


def _undo(event: dict[str, Any], loose: set[str]) -> None:
    path = Path(event["path"])
    if event["old"]:
        path.parent.mkdir(parents=True, exist_ok=True)  # a folder whose removal was not flushed
        shutil.copyfile(event["old"], path)
    else:
        path.unlink(missing_ok=True)
    loose.discard(event["path"])


# one trial


def run_trial(seed: int, root: Path, words: Sequence[str], plan: Plan, expected: str, lasts: float) -> Trial:
    """Kills and resumes until the run ends. expected: the uninterrupted run's hash; lasts: its seconds."""
    grid = next((word.partition("=")[2] for word in words if word.startswith("federation.grid=")), "ray")
    trial, place, rng, began = Trial(seed, grid), Place(root), random.Random(seed), time.monotonic()
    while not trial.ended:
        delay = rng.uniform(0, lasts) if trial.kills < plan.kills else None
        code = wait(start(place, words, plan), delay)
        trial.left += guard.end_what_is_left() if code is not None else 0
        if code is None:
            guard.end_what_is_left()  # a run that killed itself
            trial.kills += 1
            _after_kill(trial, place, plan, rng)
            trial.ended = trial.ended or (DONE if place.completed else "")  # killed between the last word and the exit
        elif code == 0 and plan.kills and not trial.kills:  # it ended before its first kill: that shows nothing
            shutil.rmtree(root)
            place, lasts = Place(root), 0.9 * lasts
        else:
            trial.ended = DONE if code == 0 else f"exit {code}: {place.log.read_text()[-300:]}"
    return _finished(trial, place, expected, began)


def _finished(trial: Trial, place: Place, expected: str, began: float) -> Trial:
    if trial.ended == DONE:
        trial.same = place.summary()["final_state_sha256"] == expected
        trial.lost += max(0, place.acknowledged() - _newest(place))
    trial.seconds = round(time.monotonic() - began, 2)
    return trial


def run_fault(seed: int, root: Path, words: Sequence[str], plan: Plan, expected: str) -> Trial:
    """One of Ray's processes is hit after a random commit; what has ended with a word is resumed: over Ray where the
    seed is even, in one process where it is odd.
    """
    name, number, needs = FAULTS[plan.fault]
    trial, place, rng, began = Trial(seed, "ray"), Place(root), random.Random(seed), time.monotonic()
    pid, after = start(place, [*words, *needs], plan), rng.randint(1, 3)
    while place.acknowledged() < after and not place.completed:
        time.sleep(0.005)
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            trial.ended = f"it ended before it was disturbed: {place.log.read_text()[-300:]}"
            guard.end_what_is_left()
            return _finished(trial, place, expected, began)
    time.sleep(rng.uniform(0, 1.5))
    trial.commits_at_kills.append(place.acknowledged())
    for victim in [process for process in supervise.tree(pid) if _comm(process).startswith(name)][:1]:
        os.kill(victim, number)
        trial.kills += 1
    code = wait(pid, PATIENCE)
    while code is not None and not trial.ended:
        trial.exits.append(code)
        trial.left += guard.end_what_is_left()
        if code == 0:
            trial.ended = DONE if trial.kills else "nothing was hit"
        elif len(trial.exits) > 1 or code != Interrupted.exit_code:
            trial.ended = f"exits {trial.exits}: {place.log.read_text()[-300:]}"
        else:
            said = [line for line in place.log.read_text().splitlines() if HOW_TO_GO_ON in line]
            trial.said = said[-1].partition(HOW_TO_GO_ON)[0] if said else ""
            trial.told = bool(said) and place.summary().get("status") == "interrupted"
            code = wait(start(place, ["federation.grid=inprocess"] if seed % 2 else [], plan), PATIENCE)
    trial.ended = trial.ended or f"killed by a signal, or not ended in {PATIENCE:g} s"
    return _finished(trial, place, expected, began)


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8")
    except OSError:
        return ""


def _after_kill(trial: Trial, place: Place, plan: Plan, rng: random.Random) -> None:
    if plan.power_cut:
        cut_power(place, rng)
    there = _newest(place)
    trial.commits_at_kills.append(there)
    trial.lost += max(0, place.acknowledged() - there)
    if place.acks.exists():
        os.truncate(place.acks, there)  # what is lost is counted once
    if trial.kills > 500:
        trial.ended = "killed 500 times without an end"


def _newest(place: Place) -> int:
    commit = checkpoint.newest(place.run / "checkpoints")
    return commit.number if commit else 0


def wait(pid: int, delay: float | None) -> int | None:
    """The exit code; None when the process was killed with all below it, after `delay` seconds or by itself."""
    deadline = None if delay is None else time.monotonic() + delay
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        if deadline is not None and time.monotonic() >= deadline:
            guard.end_what_is_left()
            return None
        time.sleep(0.005)


def reference(root: Path, words: Sequence[str]) -> tuple[str, float]:
    """The hash of an uninterrupted run and the seconds that it took."""
    place, began = Place(root), time.monotonic()
    code = wait(start(place, words, Plan()), None)
    assert code == 0, place.log.read_text()
    return str(place.summary()["final_state_sha256"]), time.monotonic() - began


def run_trials(root: Path, seeds: Sequence[int], words: Sequence[str], plan: Plan) -> dict[str, Any]:
    """Several trials beside one uninterrupted run, for faults of Ray's one without Ray: its bits are the same."""
    guard.adopt_orphans()
    alone = [word for word in words if not word.startswith("federation.grid=")] + ["federation.grid=inprocess"]
    expected, lasts = reference(root / "whole", alone if plan.fault else words)
    trials = []
    for seed in seeds:
        folder = root / f"trial-{seed}"
        if plan.fault:
            trials.append(run_fault(seed, folder, words, plan, expected))
        else:
            trials.append(run_trial(seed, folder, words, plan, expected, lasts))
        print(f"{trials[-1]}", flush=True)
        if trials[-1].good:
            shutil.rmtree(folder)
    return {
        "words": list(words),
        "plan": asdict(plan),
        "final_state_sha256": expected,
        "uninterrupted_seconds": round(lasts, 2),
        "trials": len(trials),
        "good": sum(trial.good for trial in trials),
        "kills": sum(trial.kills for trial in trials),
        "commits_lost": sum(trial.lost for trial in trials),
        "other_bits": sum(trial.ended == DONE and not trial.same for trial in trials),
        "not_ended": sum(trial.ended != DONE for trial in trials),
        "processes_left": sum(trial.left for trial in trials),
        "each": [asdict(trial) for trial in trials],
    }
