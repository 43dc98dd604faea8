"""kill -9 at random times: is a committed round ever lost, does a resumed run end with other bits?

    python benchmarks/kill.py --trials 50 --ray 10 --json docs/kill.json
    python benchmarks/kill.py --trials 10 --power-cut          # un-flushed data and renames are lost, too
    python benchmarks/kill.py --trials 10 --break fsync        # the same without a flush: must report losses
    python benchmarks/kill.py --points                         # every crash point of every commit

Every trial runs fcit-mini-short (train.local_epochs=1), is killed up to `--kills` times with all its processes, and
is resumed until it ends; its final state must have the hash of an uninterrupted run's. `--ray` of the trials use Ray,
the others the in-process grid. Exit code 1 where a commit was lost or a bit differs.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: forks must find no threads
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import argparse
import importlib.util
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HARNESS = Path(__file__).parents[1] / "tests" / "faults" / "harness.py"


def main() -> int:
    arguments = _arguments()
    harness = _load()
    import torch

    torch.set_num_threads(1)
    began, parts = time.monotonic(), []
    plan = harness.Plan(arguments.kills, arguments.power_cut or bool(arguments.leave_out), arguments.leave_out)
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        harness.warm(["federation.grid=inprocess"])
        for grid, seeds in _dealt(arguments):
            if seeds:
                words = [f"federation.grid={grid}"]
                parts.append(harness.run_trials(Path(name) / grid, seeds, words, plan))
        if arguments.points:
            chosen = harness.Plan(0, points=harness.POINTS, rotate=arguments.rotate)
            words = ["federation.grid=inprocess"]
            parts.append(harness.run_trials(Path(name) / "points", [arguments.seed], words, chosen))
    result = {"version": 1, "machine": _machine(), "seconds": round(time.monotonic() - began, 1), "runs": parts}
    for part in parts:
        print(
            {key: part[key] for key in ("words", "trials", "good", "kills", "commits_lost", "other_bits", "not_ended")}
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(part["good"] < part["trials"] for part in parts))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=0)
    parser.add_argument("--ray", type=int, default=0, help="how many of the trials use Ray")
    parser.add_argument("--kills", type=int, default=3, help="at most, per trial")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--power-cut", action="store_true")
    parser.add_argument("--break", dest="leave_out", default="", choices=["fsync", "rename"])
    parser.add_argument("--points", action="store_true", help="one run, broken off at every named crash point")
    parser.add_argument("--rotate", action="store_true", help="with --points: each commit at one of them")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _dealt(arguments: argparse.Namespace) -> list[tuple[str, list[int]]]:
    seeds = list(range(arguments.seed, arguments.seed + arguments.trials))
    return [("inprocess", seeds[: len(seeds) - arguments.ray]), ("ray", seeds[len(seeds) - arguments.ray :])]


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("harness", HARNESS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["harness"] = module
    spec.loader.exec_module(module)
    return module


def _machine() -> dict[str, Any]:
    return {"system": platform.system(), "python": platform.python_version(), "cores": os.cpu_count()}


if __name__ == "__main__":
    sys.exit(main())
