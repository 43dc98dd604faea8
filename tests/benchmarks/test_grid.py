"""The benchmark `grid` runs, and both sides get the same replies."""

import os
import subprocess
import sys

from fedstrata.benchmarks import grid
from fedstrata.benchmarks.trees import tree_seconds


def test_a_message_brings_the_same_from_both_grids() -> None:
    found = grid.bench(quick=True)
    assert list(found.ratios) == list(found.targets)
    assert all(ratio > 0 for ratio in found.ratios.values())
    assert all(words.startswith("equal bytes, sum ") for words in found.equal.values())
    assert [set(pair) for pair in found.pairs] == [
        {f"{side}, 0.1 MB in {what}" for side in ("ours", "stock") for what in ("one array", "448 arrays")}
    ]


def test_a_tree_counts_its_children() -> None:
    work = "import time\nwhile time.process_time() < 0.3: pass\ninput()"
    shell = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    with subprocess.Popen([sys.executable, "-c", shell], stdin=subprocess.PIPE) as process:
        while tree_seconds(process.pid) < 0.3:
            assert process.poll() is None
        assert tree_seconds(os.getpid()) >= tree_seconds(process.pid) >= 0.3
        process.communicate(b"\n")
