"""One side of the benchmark `scale`: a federation of many registered clients, in a process of its own.

`python -m fedstrata.benchmarks.scale_side FOLDER CLIENTS PER_ROUND ACTORS` runs a round for every line `go` and answers
its wall seconds; `told` answers what the last round trained.
"""

import sys
import time
from pathlib import Path

import yaml

from fedstrata.benchmarks.bases import instructions, llama, write_rows
from fedstrata.benchmarks.rounds import Rounds, rounds
from fedstrata.benchmarks.trees import READY

ROWS, VOCABULARY, HIDDEN = 2, 64, 16


def main(folder: Path, clients: int, per_round: int, actors: int) -> None:
    """Real loop, gate, commits and Ray grid; a model so small that the server's own cost shows."""
    write_rows(folder / "train.json", instructions(ROWS * clients, 8, 8, VOCABULARY, 0))
    write_rows(folder / "test.json", instructions(2, 8, 8, VOCABULARY, 1))
    task = {"train": "train.json", "test": "test.json", "format": "alpaca"}
    tree = {"tasks": {"words": task}, "stages": [["words"]], "partition": {"kind": "iid"}}
    (folder / "words.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    words = [
        f"model.name={llama(folder / 'base', HIDDEN, 1, VOCABULARY)}",
        "strategy.name=finetune",
        "strategy.subspaces=1",
        f"federation.clients={clients}",
        f"federation.clients_per_round={per_round}",
        "federation.rounds_per_stage=99",
        f"federation.actors={actors}",
        "train.batch_size=2",
        "train.local_epochs=1",
    ]
    with rounds(folder / "run", words, str(folder / "words.yaml")) as run:
        print(READY, flush=True)
        for line in sys.stdin:
            print(READY, told(run) if line.strip() == "told" else seconds(run), flush=True)


def seconds(run: Rounds) -> str:
    """The wall seconds of the next round."""
    began = time.perf_counter()
    run.next()
    return f"{time.perf_counter() - began:.9f}"


def told(run: Rounds) -> str:
    """How many clients and instructions the rounds so far trained, each round the same."""
    progress = run.federation.progress
    return f"{len(run.asked)} clients, {progress.bytes_up // run.number} bytes up"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
