"""The Flower ServerApp: the same federation loop on the grid that Flower hands over (`flwr run`)."""

import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedstrata.core.errors import FedstrataError
from fedstrata.server import launch

app = ServerApp()
WAIT = 120.0  # seconds for the nodes to register


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run config: `recipe` and `overrides` (key=value words), as for `fedstrata run`."""
    words = str(context.run_config.get("overrides", "")).split()
    config = launch.resolve(str(context.run_config.get("recipe", "")), ["federation.grid=flower", *words])
    _await_nodes(grid, config.federation.clients)
    folder = launch.run(config, Console(), grid)
    print(f"run folder: {folder.resolve()}")


def _await_nodes(grid: Grid, clients: int) -> None:
    """Nodes register beside the ServerApp's start; a run begins with all of its clients."""
    deadline = time.monotonic() + WAIT
    while len(list(grid.get_node_ids())) != clients:
        if time.monotonic() > deadline:
            came = len(list(grid.get_node_ids()))
            raise FedstrataError(f"federation.clients: {clients} clients must be connected, got {came} in {WAIT:.0f} s")
        time.sleep(0.1)
