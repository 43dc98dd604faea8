"""Loading and dealing a large instruction file: seconds, and peak memory as a multiple of the file's size.

    python benchmarks/loading.py --json docs/loading.json

Writes `rows` text instructions with mostly different answers, then builds a scenario on them in a fresh process:
every record is checked, hashed and dealt to `clients` clients. Peak memory is the whole process's, the interpreter and
its libraries included. Then one client's share is read, as training does. Claim: the peak stays below 1.5 × the file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TEXT = "river stone amber light engine forest letter window garden silver thunder paper harbour mountain signal"
WORDS = TEXT.split()
BUILD = """
import json, resource, sys, time
from fedstrata import scenarios
from fedstrata.core.config import ScenarioSection
began = time.perf_counter()
scenario = scenarios.build(ScenarioSection(sys.argv[1]), int(sys.argv[2]), 0)
built = time.perf_counter()
share = scenario.share([0], 0)
scenario.read(share)
read = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": built - began, "share_rows": len(share), "share_seconds": read - built, "peak_bytes": peak,
                  "scenario_hash": scenario.hash}))
"""


def write_rows(path: Path, rows: int, name: str) -> None:
    """Rows of about 300 bytes, no two alike."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            said = " ".join(WORDS[(row * step + step) % len(WORDS)] for step in range(1, 14))
            turns = [{"from": "human", "value": f"Rewrite number {row} of {name}: {said}."}]
            turns.append({"from": "gpt", "value": f"{said[::-1]} {row}"})
            file.write(("[" if not row else ",") + json.dumps({"id": f"{name}-{row}", "conversations": turns}) + "\n")
        file.write("]")


def measure(rows: int, clients: int) -> dict[str, Any]:
    """Everything in a folder of its own that is removed again."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "train.json", rows, "train")
        write_rows(folder / "test.json", 1000, "test")
        tasks = "tasks: {large: {train: train.json, test: test.json}}\nstages: [[large]]\n"
        (folder / "large.yaml").write_text(tasks + "partition: {kind: dirichlet, min_size: 1}\n")
        size = (folder / "train.json").stat().st_size
        words = [sys.executable, "-c", BUILD, str(folder / "large.yaml"), str(clients)]
        found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    sizes = {"rows": rows, "clients": clients, "file_bytes": size, "ratio": found["peak_bytes"] / size}
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()}
    return {**sizes, **found, "machine": machine}


def _cpu() -> str:
    """The processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(given.rows, given.clients)
    text = json.dumps(found, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
