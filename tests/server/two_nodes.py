"""A federation on a real Ray cluster of two nodes, for test_cluster.py: a process of its own.

`python two_nodes.py FOLDER` starts the cluster, with an actor on each node; runs the federation with one of them alone,
then with both, and takes one node away while its actor has a cohort in hand; a new node comes, and the two share a
sweep's jobs. Prints what it saw as JSON.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from fedstrata.core.config import RunConfig
from fedstrata.server import configure, jobs, launch, preparing, raygrid
from fedstrata.server.worker import Job

WORDS = (
    "federation.rounds_per_stage=1",
    "federation.clients_per_round=4",
    "federation.cohort_size=1",
    "train.local_epochs=1",
    "evaluate.shard=25",
)
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}


def main(folder: Path) -> None:
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": QUICK}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(num_cpus=1)
    try:
        grid = preparing.open_grid(config(folder, cluster.address))
        assert isinstance(grid, raygrid.RayGrid)
        crew = grid.crew
        while crew.coming:
            crew.arrive(ray.wait(list(crew.coming))[0][0])
        seen: dict[str, Any] = {"actors": sorted(crew.nodes.values()), "hit": 0}
        seen["nodes"] = sorted(node["NodeID"] for node in ray.nodes())
        rest = crew.free.pop()
        seen["alone"] = run(folder / "alone", cluster.address, grid)
        crew.free.append(rest)
        lose(cluster, second, seen)
        seen["fault"] = run(folder / "fault", cluster.address, grid)
        seen["left"] = sorted(crew.nodes.values())
        grid.close()
        seen["cluster lives"] = bool(cluster.global_state._live_node_ids())
        cluster.add_node(num_cpus=1)
        seen["swept"] = swept(folder, cluster.address)
        print(json.dumps(seen))
    finally:
        cluster.shutdown()


def config(folder: Path, address: str) -> RunConfig:
    return configure.resolve("fcit-mini-short", [*WORDS, f"run.dir={folder}", f"federation.ray_address={address}"])


def swept(folder: Path, address: str) -> list[Any]:
    """Two jobs at once: their exit codes and final states."""
    words = ("fcit-mini-short", *WORDS, "federation.grid=inprocess")
    todo = [Job(words, str(folder / name), False, str(folder / f"{name}.log")) for name in ("one", "two")]
    with jobs.hands(folder, len(todo), address) as hands, ThreadPoolExecutor(len(todo)) as pool:
        answers = list(pool.map(lambda hand, job: hand.run(job), hands, todo))
        for hand in hands:
            hand.close()
    ended = [json.loads((Path(job.folder) / "summary.json").read_text()) for job in todo]
    return [[answer.code, end["final_state_sha256"]] for answer, end in zip(answers, ended, strict=True)]


def run(folder: Path, address: str, grid: raygrid.RayGrid) -> Any:
    done = launch.run(config(folder, address), Console(quiet=True), grid)
    return json.loads((done / "summary.json").read_text())


def lose(cluster: Cluster, second: Any, seen: dict[str, Any]) -> None:
    """The second node is gone as soon as an actor on it has been handed a cohort."""
    real = raygrid._Exchange._submit

    def submit(self: Any, unit: Any, actor: Any) -> None:
        real(self, unit, actor)
        train = unit.messages[0].metadata.message_type == "train"
        if train and self.crew.nodes[actor] == second.node_id:
            cluster.remove_node(second, allow_graceful=False)
            seen["hit"] += 1

    raygrid._Exchange._submit = submit  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
