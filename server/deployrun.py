"""`fedstrata deploy run`: submits a Flower run, watches it, and submits a new one on the same run folder when it dies.

Flower marks a run failed when its ServerApp dies, and has no way to go on with it; our commits have.
"""

import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fedstrata.core import flowerapp
from fedstrata.core.config import require
from fedstrata.core.errors import BadInput, FedstrataError
from fedstrata.server import configure, deploynodes
from fedstrata.server.deployflower import Flower, Place
from fedstrata.server.runfolder import CONFIG, SUMMARY, RunFolder
from fedstrata.strategies import find

POLL = 5.0  # seconds between two looks; a look is a process of Flower's
TIMEOUT = 900.0  # seconds for the replies of one exchange
REACH = 120.0  # seconds for the SuperLink to answer at all
LIVE = ("pending", "starting", "running")


def supervise(place: Place, recipe: str, words: Sequence[str], attempts: int, console: Console) -> Path:
    """Runs a federation on the deployment to its end; returns the run folder.

    Raises:
        BadInput: words that no run takes, or no run.dir, which the server's later attempts must find again.
        FedstrataError: the SuperLink is not reached, or all attempts failed.
    """
    require(attempts > 0, "--attempts", "at least 1", attempts)
    words = [*defaults(recipe, words), *words]
    folder = Path(configure.resolve(recipe, words).run.dir)
    require(folder.is_absolute() and folder != Path("/"), "run.dir", "an absolute path on the server host", str(folder))
    if _completed(folder):
        return folder
    flower = Flower(place)
    reach(flower, console)
    for name in deploynodes.register(flower):
        console.print(f"{name}: registered", highlight=False)
    for attempt in range(1, attempts + 1):
        run = running(flower) or submit(flower, recipe, words, "resume")
        console.print(f"attempt {attempt} of {attempts}: Flower run {run}", highlight=False)
        status, details = watch(flower, run, Teller(folder, console))
        if status == "finished:completed" and _completed(folder):
            return folder
        console.print(f"Flower run {run} ended: {status} {details}".rstrip(), highlight=False, markup=False)
    raise FedstrataError(f"{folder}: not completed after {attempts} attempts; its commits stand, run the same again")


def defaults(recipe: str, words: Sequence[str]) -> list[str]:
    """What a deployment does unless a file or the words say otherwise: clients are neither too loud nor too few.

    And they may be gone without a word, so nobody waits an hour for them.
    """
    config = configure.resolve(recipe, words)
    told = configure.told(recipe, words)
    options = vars(find(config.strategy.name).config_type())
    wanted = {"strategy.token_min_samples": "50"} if "token_min_samples" in options else {}
    wanted |= {} if config.federation.update_noise else {"federation.clip": "median"}
    wanted["federation.timeout"] = f"{TIMEOUT:g}"
    return [f"{key}={value}" for key, value in wanted.items() if key not in told]


def reach(flower: Flower, console: Console, wait: float = REACH) -> None:
    """Waits until the SuperLink answers. Raises FedstrataError with the reason when it does not in `wait` seconds."""
    deadline, told = time.monotonic() + wait, False
    while True:
        try:
            flower.runs()
            return
        except FedstrataError as error:
            if time.monotonic() > deadline:
                raise FedstrataError(
                    f"{flower.place.address}: no SuperLink answers in {wait:.0f} s: {error}"
                ) from error
        if not told:
            console.print(f"waiting for the SuperLink at {flower.place.address} …", highlight=False)
        told = True
        time.sleep(POLL)


def running(flower: Flower) -> str:
    """A run that an earlier supervisor left running is watched, not started again."""
    return next((str(run["run-id"]) for run in flower.runs() if run["status"] in LIVE), "")


def submit(flower: Flower, recipe: str, words: Sequence[str], how: str) -> str:
    """Starts a Flower run; returns its id. how: resume, or rehearse."""
    app = flowerapp.write(flower.place.home / "app")
    settings = {"recipe": json.dumps(recipe), "overrides": json.dumps(shlex.join(words)), how: "true"}
    return flower.submit(app, settings)


def watch(flower: Flower, run: str, tell: Callable[[], None]) -> tuple[str, str]:
    """Waits for the end of a run; a SuperLink that is away for a while is waited for. Returns status and details."""
    away = 0.0
    while True:
        tell()
        try:
            status, details = flower.status(run)
            away = 0.0
        except FedstrataError:
            away = away or time.monotonic()
            if time.monotonic() - away > REACH:
                raise
            status = details = ""
        if status.startswith("finished"):
            tell()
            return status, details
        time.sleep(POLL)


class Teller:
    """Says each round and each row of scores once, from the run folder's events."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.told = len(self._lines())

    def __call__(self) -> None:
        lines = self._lines()
        for line in lines[self.told :]:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.told = len(lines)

    def _lines(self) -> list[str]:
        try:
            events = RunFolder(self.folder).events()
        except BadInput:
            return []  # not begun
        return [_line(event) for event in events if event["event"] in ("round", "stage_scored", "resumed")]


def _line(event: dict[str, object]) -> str:
    if event["event"] == "round":
        people = event["participants"]
        names = " ".join(str(row["client"]) for row in people) if isinstance(people, list) else ""
        cost = f"{event['bytes_up']} bytes up, {event['bytes_down']} down, {event['seconds']:.1f} s"
        return f"stage {event['stage']} round {event['round']}: clients {names or 'none'}, {cost}"
    if event["event"] == "resumed":
        return f"goes on from commit {event['commit']}"
    return f"stage {event['stage']} scored: {event['scores']}"


def _completed(folder: Path) -> bool:
    if not (folder / CONFIG).is_file() or not (folder / SUMMARY).is_file():
        return False
    return bool(RunFolder(folder).summary.get("status") == "completed")
