"""Stock Flower simulation, round by round: in a process of its own, which waits for a word before every round.

`python -m fedstrata.benchmarks.stock <client app> <clients> <actors> <start.npz> <out.npz>` is that process.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedstrata.benchmarks.trees import READY, Side, side

Named = dict[str, npt.NDArray[np.float32]]


class Stock:
    """The other process, seen from here."""

    def __init__(self, process: Side, out: Path) -> None:
        self._process, self._out = process, out

    def next(self) -> None:
        """One round of FedAvg over all clients."""
        self._process.ask("go")

    def arrays(self) -> Named:
        """The aggregate after the last round."""
        with np.load(self._out) as file:
            return dict(file)


@contextmanager
def stock(client_app: str, clients: int, actors: int, start: Named, folder: Path) -> Iterator[Stock]:
    """Starts the simulation of `client_app` (module:attribute); `start`: the arrays of the first round."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "start.npz", **start)  # type: ignore[arg-type]  # numpy types every keyword as a flag
    words = [client_app, str(clients), str(actors), str(folder / "start.npz"), str(folder / "out.npz")]
    with side("fedstrata.benchmarks.stock", words, folder / "log") as process:
        yield Stock(process, folder / "out.npz")


def main(client_app: str, clients: int, actors: int, start: Path, out: Path) -> None:
    """The simulation: its ServerApp runs one round of Flower's own FedAvg per word on stdin."""
    import importlib

    from flwr.app import Array, ArrayRecord, Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    with np.load(start) as file:
        arrays = ArrayRecord({name: Array(value) for name, value in file.items()})
    app = ServerApp()

    @app.main()
    def serve(grid: Grid, context: Context) -> None:
        current = arrays
        print(READY, flush=True)
        for _ in sys.stdin:
            strategy = FedAvg(
                fraction_evaluate=0.0, min_train_nodes=clients, min_evaluate_nodes=0, min_available_nodes=clients
            )
            current = strategy.start(grid, current, num_rounds=1).arrays
            np.savez(out, **{name: array.numpy() for name, array in current.items()})  # type: ignore[arg-type]
            print(READY, flush=True)

    module, _, name = client_app.partition(":")
    resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": actors}}
    run_simulation(app, getattr(importlib.import_module(module), name), clients, backend_config=resources)


if __name__ == "__main__":
    app_name, count, processes, first, last = sys.argv[1:]
    main(app_name, int(count), int(processes), Path(first), Path(last))
