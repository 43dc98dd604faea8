"""docs/benchmarks.md from one JSON per benchmark: `python benchmarks/table.py docs/benchmarks > docs/benchmarks.md`."""

import json
import sys
from pathlib import Path
from typing import Any

from fedstrata.benchmarks import NAMES
from fedstrata.server.bench import rows

HEAD = """# Benchmarks

Two ways of doing the same work, side by side in one run, one thread each; where time is measured, a figure is the
median of at least five interleaved pairs, as a ratio, since machines are noisy.
`fedstrata bench NAME --json docs/benchmarks/NAME.json` measures one again,
`python benchmarks/table.py docs/benchmarks > docs/benchmarks.md` writes this page. A ratio is baseline / ours (bigger
is better), a figure without × is a ceiling (smaller is better). Raw pairs, machine and versions are in the JSON files.
"""


def page(folder: Path) -> str:
    """The whole page; a benchmark without a file reads "not run"."""
    return "\n".join([HEAD, *(section(name, folder / f"{name}.json") for name in NAMES)])


def section(name: str, path: Path) -> str:
    """One benchmark: its table, what was equal, notes and machine."""
    if not path.exists():
        return f"## {name}\n\nNot run.\n"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"## {name}", "", f"{result['what']} ({result['clock']}).", ""]
    lines += ["| against | measured | target | reached |", "|---|--:|--:|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(result)]
    lines += ["", *[f"- Equal: {key}: {value}" for key, value in result["equal"].items()]]
    lines += [f"- {note}" for note in result["notes"]]
    machine = result["machine"]
    lines += [f"- {machine['processor']}, {machine['cores']} cores, load {machine['load']:.1f}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(Path(sys.argv[1])), end="")
