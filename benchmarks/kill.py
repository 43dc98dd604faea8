"""kill -9 at random times: is a committed round ever lost, does a resumed run end with other bits?

    python benchmarks/kill.py --all --trials 40 --ray 10 --json docs/kill.json  # everything below, in one call
    python benchmarks/kill.py --trials 40                      # all processes killed at random times
    python benchmarks/kill.py --ray 10                         # the same over Ray
    python benchmarks/kill.py --trials 10 --power-cut          # un-flushed data and renames are lost, too
    python benchmarks/kill.py --trials 10 --break fsync        # the same without a flush: must report losses
    python benchmarks/kill.py --points                         # every crash point of every commit
    python benchmarks/kill.py --ray 3 --fault raylet actor stop  # one of Ray's processes alone killed, or stopped

Every trial runs fcit-mini-short (train.local_epochs=1), is killed up to `--kills` times with all its processes, and
is resumed until it ends; its final state must have the hash of an uninterrupted run's. `--trials` use the in-process
grid. Exit code 1 where a commit was lost or a bit differs; with `--all` also where a control loses nothing.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: forks must find no threads
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import argparse
import importlib
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HARNESS = Path(__file__).parents[1] / "tests" / "faults"
FAULTS = ("raylet", "actor", "stop")
COUNTS = ("trials", "good", "kills", "commits_lost", "other_bits", "not_ended", "processes_left")
Part = tuple[str, int, dict[str, Any]]  # grid, number of trials, fields of the harness's plan


def main() -> int:
    arguments = _arguments()
    sys.path.insert(0, str(HARNESS))
    harness: Any = importlib.import_module("harness")
    import torch

    torch.set_num_threads(1)
    began, parts, bad = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        harness.warm(["federation.grid=inprocess"])
        for number, (grid, trials, fields) in enumerate(_suite(arguments) if arguments.all else _asked(arguments)):
            seeds = range(arguments.seed, arguments.seed + trials)
            words = [f"federation.grid={grid}", *arguments.words]
            plan = harness.Plan(**{"kills": arguments.kills, **fields})
            part = harness.run_trials(Path(name) / str(number), seeds, words, plan)
            print(words, fields, {key: part[key] for key in COUNTS}, flush=True)
            control = arguments.all and plan.leave_out
            bad += not part["commits_lost"] if control else part["good"] < part["trials"]
            parts.append(part)
            if arguments.json:
                _write(arguments.json, parts, time.monotonic() - began)
    return int(bad > 0)


def _write(path: Path, parts: list[Any], seconds: float) -> None:
    """After every part, so that a call that takes hours shows what it has."""
    head = {"version": 1, "command": f"python benchmarks/kill.py {' '.join(sys.argv[1:])}", "machine": _machine()}
    tree = {**head, "seconds": round(seconds, 1), "runs": parts}
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every experiment, as docs/durability.md lists them")
    parser.add_argument("--trials", type=int, default=0, help="in one process each")
    parser.add_argument("--ray", type=int, default=0, help="further trials, over Ray")
    parser.add_argument("--kills", type=int, default=3, help="at most, per trial")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--power-cut", action="store_true")
    parser.add_argument("--break", dest="leave_out", default="", choices=["fsync", "rename"])
    parser.add_argument("--fault", nargs="+", default=[""], choices=FAULTS, help="of the trials over Ray")
    parser.add_argument("--words", nargs="*", default=[], help="config of the runs beside the grid")
    parser.add_argument("--points", action="store_true", help="one run, broken off at every named crash point")
    parser.add_argument("--rotate", action="store_true", help="with --points: each commit at one of them")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _asked(arguments: argparse.Namespace) -> list[Part]:
    """What the options name, one by one."""
    cut = {"power_cut": arguments.power_cut or bool(arguments.leave_out), "leave_out": arguments.leave_out}
    over_ray: list[Part] = [("ray", arguments.ray, {**cut, "fault": fault}) for fault in arguments.fault]
    parts: list[Part] = [("inprocess", arguments.trials, cut), *over_ray]
    if arguments.points:
        parts.append(("inprocess", 1, _points(arguments.rotate)))
    return [part for part in parts if part[1]]


def _suite(arguments: argparse.Namespace) -> list[Part]:
    """Everything; --trials and --ray say how much of it."""
    some, few = max(1, arguments.trials // 4), max(2, arguments.trials // 10)
    return [
        ("inprocess", arguments.trials, {}),
        ("ray", arguments.ray, {}),
        ("inprocess", 1, _points(arguments.rotate)),
        ("inprocess", some, {"power_cut": True}),
        *[("inprocess", few, {"power_cut": True, "leave_out": flush}) for flush in ("fsync", "rename")],
        *[("ray", max(1, arguments.ray // 5), {"fault": fault}) for fault in FAULTS],
    ]


def _points(rotate: bool) -> dict[str, Any]:
    return {"kills": 0, "points": importlib.import_module("harness").POINTS, "rotate": rotate}


def _machine() -> dict[str, Any]:
    return {"system": platform.system(), "python": platform.python_version(), "cores": os.cpu_count()}


if __name__ == "__main__":
    sys.exit(main())
