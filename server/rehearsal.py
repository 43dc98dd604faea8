"""A dry round: one round with every client that is connected, on a folder that is no run's."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from flwr.serverapp import Grid
from rich.console import Console

from fedstrata.core.config import RunConfig
from fedstrata.server import launch
from fedstrata.server.preparing import prepare
from fedstrata.server.runfolder import locked


def rehearse(config: RunConfig, grid: Grid, console: Console) -> None:
    """Asks, trains and gates as the first round would; what came of it is in `run.dir`'s events."""
    everybody = replace(config.federation, clients_per_round=config.federation.clients)
    prepared = prepare(replace(config, federation=everybody), grid)
    try:
        with locked(Path(config.run.dir)):
            federation = launch.federation_of(prepared, Path(config.run.dir), console, None)
            with closing(federation.chronicle.tracker), closing(federation.chronicle.display):
                federation.rehearse()
    finally:
        prepared.close()
