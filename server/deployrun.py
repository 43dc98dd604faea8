"""`fedstrata deploy run`: submits a Flower run, watches it, and submits a new one on the same run folder when it dies.

Flower marks a run failed when its ServerApp dies, and has no way to go on with it; our commits have.
"""

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app.user_config import UserConfig
from rich.console import Console

from fedstrata.core import flowerapp
from fedstrata.core.config import require
from fedstrata.core.errors import BadInput, FedstrataError
from fedstrata.server import configure, deploynodes
from fedstrata.server.deployflower import Flower, Place
from fedstrata.server.deploytell import Teller
from fedstrata.server.runfolder import CONFIG, SUMMARY, RunFolder
from fedstrata.strategies import find

POLL = 5.0  # seconds between two looks; a look is a process of Flower's
TIMEOUT = 900.0  # seconds for the replies of one exchange
REACH = 120.0  # seconds for the SuperLink to answer at all
LIVE = ("pending", "starting", "running")


def supervise(place: Place, recipe: str, words: Sequence[str], attempts: int, console: Console) -> Path:
    """Runs a federation on the deployment to its end; returns the run folder.

    Raises:
        BadInput: words that no run takes, no run.dir, which the server's later attempts must find again, or what the
            server itself refuses as bad input.
        FedstrataError: the SuperLink is not reached, another run is going on, or all attempts failed.
    """
    require(attempts > 0, "--attempts", "at least 1", attempts)
    words = [*defaults(recipe, words), *words]
    folder = Path(configure.resolve(recipe, words).run.dir)
    require(folder.is_absolute() and folder != Path("/"), "run.dir", "an absolute path on the server host", str(folder))
    if _completed(folder):
        return folder
    flower = Flower(place)
    reach(flower, console)
    asked = settings(place, recipe, words, "resume")
    standing = adopted(flower, asked, console)
    for done in deploynodes.register(flower):
        console.print(done, highlight=False, markup=False, soft_wrap=True)
    for attempt in range(1, attempts + 1):
        run = standing or submit(flower, asked)
        standing = ""
        console.print(f"attempt {attempt} of {attempts}: Flower run {run}", highlight=False)
        status, details = watch(flower, run, Teller(folder, console))
        if status == "finished:completed" and _completed(folder):
            return folder
        if flowerapp.REFUSED in details:
            raise BadInput(details.partition(flowerapp.REFUSED)[2])
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


def adopted(flower: Flower, asked: UserConfig, console: Console) -> str:
    """A run with these very settings that an earlier supervisor left running: it is watched, not started again.

    Raises:
        FedstrataError: another run is going on; says which and in which folder.
    """
    if not (run := running(flower)):
        return ""
    its = flower.settings(run)
    if its != asked:
        folder = folder_of(its)
        where = f"in {folder}" if folder else "and names no run folder"
        where += " with other words" if folder == folder_of(asked) else ""
        way = f"wait for it, or end it with FLWR_HOME={flower.place.home} flwr stop {run}"
        raise FedstrataError(f"Flower run {run} is going on {where}; a deployment runs one at a time: {way}")
    console.print(f"Flower run {run} is going on with these very words: it is watched", highlight=False)
    return run


def running(flower: Flower) -> str:
    """The id of the run that is going on; empty when there is none."""
    return next((str(run["run-id"]) for run in flower.runs() if run["status"] in LIVE), "")


def folder_of(asked: UserConfig) -> str:
    """The run folder that a run's settings name; what else is going on names none."""
    with contextlib.suppress(ValueError):  # words that are not ours
        words = shlex.split(str(asked.get("overrides", "")))
        return next((word.removeprefix("run.dir=") for word in reversed(words) if word.startswith("run.dir=")), "")
    return ""


def settings(place: Place, recipe: str, words: Sequence[str], how: str) -> UserConfig:
    """The run config of a Flower run. how: resume, or rehearse."""
    insecure: UserConfig = {} if place.certs else {"insecure": True}
    return {"recipe": recipe, "overrides": shlex.join(words), how: True, **insecure}


def submit(flower: Flower, asked: UserConfig) -> str:
    """Starts a Flower run; returns its id."""
    app = flowerapp.write(flower.place.home / "app")
    return flower.submit(app, {key: json.dumps(value) for key, value in asked.items()})


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


def _completed(folder: Path) -> bool:
    if not (folder / CONFIG).is_file() or not (folder / SUMMARY).is_file():
        return False
    return bool(RunFolder(folder).summary.get("status") == "completed")
