"""One side of the benchmark `grid`, in a process of its own: a grid that asks all clients when it is told to.

`python -m fedstrata.benchmarks.grid_side ours|stock CLIENTS ACTORS` reads lines `CASE VERB` and answers each with a
line: CASE is megabytes:arrays; VERB is a number of exchanges, or check (one exchange, and what came is hashed).
"""

import hashlib
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedstrata.benchmarks.trees import READY
from fedstrata.server.arrivals import ArrivingRayGrid
from fedstrata.server.placement import Wanted

COHORT = 16
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """An update of the same size. It was made beforehand, so that nothing but the message is measured."""
    came = message.content.array_records["arrays"]
    facts = tuple((name, array.shape) for name, array in came.items())
    record = updates(facts)[int(context.node_config["partition-id"]) % COHORT]
    content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)


@lru_cache(maxsize=1)
def updates(facts: tuple[tuple[str, tuple[int, ...]], ...]) -> list[ArrayRecord]:
    """As many as a cohort has clients, no two with a byte in common memory: an actor ships each by itself."""
    made = []
    for slot in range(COHORT):
        draw = np.random.default_rng(slot)
        arrays = {name: Array(draw.standard_normal(shape, dtype=np.float32)) for name, shape in facts}
        made.append(ArrayRecord(arrays))
    return made


@lru_cache(maxsize=4)
def payload(case: str) -> ArrayRecord:
    """`megabytes:arrays`, drawn from a fixed seed; names as PEFT has them."""
    megabytes, count = case.split(":")
    draw = np.random.default_rng(0)
    size = int(float(megabytes) * 250_000) // int(count)
    names = [f"base_model.model.layers.{index}.lora.weight" for index in range(int(count))]
    return ArrayRecord({name: Array(draw.standard_normal(size, dtype=np.float32)) for name in names})


def exchange(grid: Grid, nodes: Sequence[int], case: str, check: bool) -> list[str]:
    """One message to every client and its reply; `check`: hash and sum of each."""
    record, found = payload(case), list[str]()

    def take(asked: Sequence[Message], came: Sequence[Message]) -> None:
        for reply in came:
            record = reply.content.array_records["arrays"]  # raises where the reply is an error
            found.append(digest(record) if check else "")
            del reply.content["arrays"]

    sent = [Message(RecordDict({"arrays": record}), node, "train") for node in nodes]
    if isinstance(grid, ArrivingRayGrid):
        grid.arrived = take
        list(grid.send_and_receive(sent))
    else:
        take(sent, list(grid.send_and_receive(sent)))
    if len(found) != len(nodes):
        raise RuntimeError(f"{len(found)} replies of {len(nodes)}")
    return found


def digest(record: ArrayRecord) -> str:
    """The bytes' hash, and the sum."""
    sha, total = hashlib.sha256(), 0.0
    for array in record.values():
        sha.update(array.data)
        total += float(array.numpy().sum(dtype=np.float64))
    return f"{sha.hexdigest()} {total!r}"


def listen(grid: Grid, nodes: Sequence[int]) -> None:
    """Does what the lines on stdin say."""
    print(READY, flush=True)
    for line in sys.stdin:
        case, verb = line.split()
        began, found = time.perf_counter(), list[str]()
        for _ in range(1 if verb == "check" else int(verb)):
            found = sorted(exchange(grid, nodes, case, verb == "check"))
        wall = time.perf_counter() - began
        total = sum(float(one.split()[1]) for one in found if one)
        checked = f"{hashlib.sha256(' '.join(found).encode()).hexdigest()} {total:.6f}"
        print(READY, checked if verb == "check" else f"{wall:.9f}", flush=True)


def ours(clients: int, actors: int) -> None:
    """RayGrid, in cohorts."""
    grid = ArrivingRayGrid(clients, COHORT, Wanted(local=actors), client_app=f"{NAME}:app")
    try:
        listen(grid, list(grid.get_node_ids()))
    finally:
        grid.close()


def stock(clients: int, actors: int) -> None:
    """Flower's own simulation of the same ClientApp."""
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(nodes := list(grid.get_node_ids())) < clients:
            time.sleep(0.1)
        listen(grid, nodes)

    backend: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": actors}}
    client: ClientApp = importlib.import_module(NAME).app  # by name, as Flower's users have it, and not by value
    run_simulation(server, client, clients, backend_config=backend)


NAME = "fedstrata.benchmarks.grid_side"
SIDES: dict[str, Callable[[int, int], None]] = {"ours": ours, "stock": stock}

if __name__ == "__main__":
    SIDES[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
