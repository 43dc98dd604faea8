"""One run as one value, from its folder or from the JSON file that `result_json` made of it.

A result file holds what tables are built from, so runs too long for one sitting can be collected under `docs/results/`.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fedstrata.core.errors import BadInput
from fedstrata.core.metrics import AccuracyMatrix
from fedstrata.server.runfolder import RunFolder, read_json, read_summary

VERSION = 1
PACKAGES = ("fedstrata", "flwr", "ray", "torch", "transformers", "peft", "numpy")
PLACES = ("run", "track")  # sections that say where things go, not what is computed
HOW_FAST = (  # keys that decide how fast a run is, not what comes out
    "federation.actors",
    "federation.grid",
    "federation.memory_budget",
    "federation.ray_address",
    "federation.timeout",
    "evaluate.batch_size",
    "evaluate.shard",
    "model.device",
)


@dataclass(frozen=True)
class Result:
    """What one run came to; `settings` are the dotted config keys that decide its result, seed included."""

    source: str
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    matrix: AccuracyMatrix

    @property
    def seed(self) -> int:
        return int(self.summary["seed"])

    @property
    def strategy(self) -> str:
        return str(self.settings.get("strategy.name", self.summary["strategy"]))

    @property
    def scenario(self) -> str:
        return str(self.settings.get("scenario.name", "unnamed"))

    @property
    def completed(self) -> bool:
        return bool(self.summary.get("status") == "completed")

    def value(self, name: str) -> float | None:
        """A number of the summary; what it lacks is read off the matrix where that can be."""
        found = self.summary.get(name)
        return float(found) if found is not None else getattr(self.matrix, name, None)


def result_json(run_dir: Path) -> dict[str, Any]:
    """A run folder as one JSON value: everything that tables need, without paths of the machine it ran on.

    `versions`, `machine` and `commit` are those of the process that calls this: call it where the run was made.

    Raises:
        BadInput: not the folder of a run that has ended, or a file in it is broken.
    """
    folder = RunFolder(run_dir)
    ends = [event.get("time") for event in folder.events() if event["event"] == "run_finished"]
    return {
        "version": VERSION,
        "config_hash": config_hash(folder.config),
        "config": {key: value for key, value in folder.config.items() if key not in PLACES},
        "summary": folder.summary,
        "matrix": folder.matrix.to_json(),
        "last_by_task": folder.matrix.final,
        "finished": ends[-1] if ends else None,
        "commit": _commit(),
        "versions": versions(),
        "machine": {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()},
    }


def load(path: Path) -> Result:
    """A run folder or a result file as a `Result`. A run without summary.json counts as not finished.

    Raises:
        BadInput: neither of the two, or broken; names the file.
    """
    if path.is_file():
        return _from_file(path)
    folder = RunFolder(path)
    if not folder.has("summary.json"):
        name = flatten(folder.config).get("strategy.name", "")
        unfinished = {"status": "not finished", "seed": folder.config.get("seed", 0), "strategy": name}
        return Result(str(path), settings(folder.config), unfinished, AccuracyMatrix((), (), ()))
    scored = folder.has("matrix.json") or folder.summary.get("status") == "completed"
    matrix = folder.matrix if scored else AccuracyMatrix((), (), ())
    return _checked(Result(str(path), settings(folder.config), folder.summary, matrix))


def _from_file(path: Path) -> Result:
    tree = read_json(path)
    if not isinstance(tree, dict) or tree.get("version") != VERSION or not isinstance(tree.get("config"), dict):
        raise BadInput(f"{path}: not a result file (an object of version {VERSION} with a config)")
    summary = read_summary(tree.get("summary"), f"{path}: summary")
    matrix = AccuracyMatrix.from_json(tree.get("matrix"), f"{path}: matrix")
    return _checked(Result(str(path), settings(tree["config"]), summary, matrix))


def _checked(result: Result) -> Result:
    missing = {"status", "seed", "strategy"} - set(result.summary)
    if missing:
        raise BadInput(f"{result.source}: the summary lacks {', '.join(sorted(missing))}")
    return result


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of everything in a config that decides the result."""
    flat = flatten(config)
    return {key: flat[key] for key in sorted(flat) if key.split(".")[0] not in PLACES and key not in HOW_FAST}


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of `settings(config)` as canonical JSON: equal for runs that must have equal results."""
    text = json.dumps(settings(config), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide what comes out; None where one is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; Linux tells it in /proc/cpuinfo only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this file is tracked in, "-dirty" when changed; None for an installed copy."""
    here = Path(__file__).resolve()
    try:
        for words in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--abbrev=40", "--dirty"]):
            out = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()
