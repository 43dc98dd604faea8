"""The Flower ServerApp: the same federation loop on the grid that Flower hands over (`flwr run`)."""

import os
import shlex
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedstrata.core import flowerapp, signing
from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput, FedstrataError
from fedstrata.server import configure, launch
from fedstrata.server.flower_private import simulated
from fedstrata.server.rehearsal import rehearse
from fedstrata.server.runfolder import CONFIG
from fedstrata.server.signed import SignedGrid

app = ServerApp()
WAIT = 120.0  # seconds for the nodes to register
NODES = "FEDSTRATA_NODES"  # the folder of the clients' public keys, client-<partition>.pub


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run config: `recipe` and `overrides` (key=value words, quoted as in a shell), as for `fedstrata run`; `resume`.

    resume: goes on with the run that `run.dir` holds, if it holds one: Flower cannot restart a run, we can.
    rehearse: one dry round with every client (`fedstrata deploy check --round`).
    insecure: a deployment without keys, whose replies are not signed.
    """
    try:
        _serve(grid, context)
    except BadInput as error:
        raise BadInput(f"{flowerapp.REFUSED}{error}") from error


def _serve(grid: Grid, context: Context) -> None:
    grid = trusted(grid, bool(context.run_config.get("insecure", False)))
    config = _config(str(context.run_config.get("recipe", "")), str(context.run_config.get("overrides", "")))
    _await_nodes(grid, config.federation.clients)
    if context.run_config.get("rehearse", False):
        rehearse(config, grid, Console())
        return
    folder = Path(config.run.dir)
    if context.run_config.get("resume", False) and config.run.dir and (folder / CONFIG).is_file():
        launch.resume(folder, Console(), grid)
    else:
        folder = launch.run(config, Console(), grid)
    print(f"run folder: {folder.resolve()}")


def _config(recipe: str, overrides: str) -> RunConfig:
    """Flower serves one client per message, so every cohort is a cohort of one."""
    try:
        words = shlex.split(overrides)
    except ValueError as error:
        raise BadInput(f"overrides: not words as a shell reads them ({error}), got {overrides!r}") from error
    return configure.resolve(recipe, [*words, "federation.grid=flower", "federation.cohort_size=1"])


def trusted(grid: Grid, insecure: bool) -> Grid:
    """A deployment's grid, which lets no answer through but those that the clients' keys in `FEDSTRATA_NODES` signed.

    Flower's simulation has no keys, and its grid stays as it is.

    Raises:
        BadInput: a deployment without keys that was not told to be insecure.
    """
    if folder := os.environ.get(NODES):
        return SignedGrid(grid, signing.public_keys(Path(folder)))
    if not insecure and not simulated(grid.run):
        raise BadInput(
            f"{NODES}: must name the folder of the clients' public keys, which `fedstrata deploy keys` makes as "
            "server/nodes, in the environment of the server's flower-superexec: without it no reply's signature can be "
            "checked; for tests on one machine: `fedstrata deploy run --insecure`"
        )
    return grid


def _await_nodes(grid: Grid, clients: int) -> None:
    """Nodes register beside the ServerApp's start; after a while a run begins with those that are there."""
    deadline = time.monotonic() + WAIT
    while len(list(grid.get_node_ids())) < clients and time.monotonic() < deadline:
        time.sleep(0.1)
    if not list(grid.get_node_ids()):
        raise FedstrataError(f"federation.clients: of {clients} clients none was connected within {WAIT:.0f} s")
