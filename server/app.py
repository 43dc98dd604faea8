"""The Flower ServerApp: the same federation loop on the grid that Flower hands over (`flwr run`)."""

import shlex
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedstrata.core.config import RunConfig
from fedstrata.core.errors import BadInput, FedstrataError
from fedstrata.server import configure, launch
from fedstrata.server.runfolder import CONFIG

app = ServerApp()
WAIT = 120.0  # seconds for the nodes to register


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run config: `recipe` and `overrides` (key=value words, quoted as in a shell), as for `fedstrata run`; `resume`.

    resume: goes on with the run that `run.dir` holds, if it holds one: Flower cannot restart a run, we can.
    """
    config = _config(str(context.run_config.get("recipe", "")), str(context.run_config.get("overrides", "")))
    _await_nodes(grid, config.federation.clients)
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


def _await_nodes(grid: Grid, clients: int) -> None:
    """Nodes register beside the ServerApp's start; a run begins with all of its clients."""
    deadline = time.monotonic() + WAIT
    while len(list(grid.get_node_ids())) != clients:
        if time.monotonic() > deadline:
            came = len(list(grid.get_node_ids()))
            raise FedstrataError(f"federation.clients: {clients} clients must be connected, got {came} in {WAIT:.0f} s")
        time.sleep(0.1)
