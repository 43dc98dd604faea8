"""The tables of docs/results.md: strategies × seeds on one scenario, one JSON per run under docs/results/.

    python benchmarks/claims.py fcit-mini --strategies disco finetune joint oracle random-route --jobs 2
    fedstrata compare docs/results/fcit-mini-*.json --markdown docs/fcit-mini.md

A run whose JSON is there is skipped, so the table can grow over several sittings. Every run is the plain command
`fedstrata run SCENARIO strategy.name=… seed=…`; with more than one job it stays in one process (same bits).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedstrata.server.results import result_json

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def run(scenario: str, label: str, seed: int, words: list[str]) -> str:
    """One cell; a label such as `finetune+subspaces=1` names a strategy and an option."""
    target = RESULTS / f"{scenario}-{label}-seed{seed}.json"
    if target.exists():
        return f"{target.name}: there"
    name, _, option = label.partition("+")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from fedstrata.server.cli import main; main()", "run", scenario]
        command += [f"strategy.name={name}", f"seed={seed}", f"run.dir={folder}/run", *words]
        command += [f"strategy.{option}"] if option else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{target.name}: FAILED\n{done.stderr[-2000:]}"
        tree = result_json(Path(folder) / "run")
    RESULTS.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return f"{target.name}: last {tree['summary']['last']:.1f}"


def main() -> None:
    """Runs the missing cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario")
    parser.add_argument("--strategies", nargs="+", default=["disco", "finetune", "joint"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--words", nargs="*", default=[], help="further key=value words")
    given = parser.parse_args()
    words = [*given.words, *(["federation.grid=inprocess"] if given.jobs > 1 else [])]
    cells = [(given.scenario, label, seed, words) for seed in given.seeds for label in given.strategies]
    with ThreadPoolExecutor(given.jobs) as pool:
        for line in pool.map(lambda cell: run(*cell), cells):
            print(line, flush=True)


if __name__ == "__main__":
    main()
