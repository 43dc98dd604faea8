"""kill -9 at random times and at named points: nothing that was committed is lost, and no bit differs.

`benchmarks/kill.py` does the same at length; it runs as a process of its own, since forks must find no threads.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill.py"


def kill(folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """The script's exit code and what it found in its one run of trials."""
    out = folder / "kill.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--json", str(out)], capture_output=True, text=True, timeout=500
    )
    assert out.exists(), done.stderr[-2000:]
    (found,) = json.loads(out.read_text(encoding="utf-8"))["runs"]
    return done.returncode, found


def test_three_runs_killed_at_random_times_end_with_the_same_bits(tmp_path: Path) -> None:
    code, found = kill(tmp_path, "--trials", "3")
    assert (found["good"], found["commits_lost"], found["other_bits"]) == (3, 0, 0), found
    assert found["kills"] >= 3
    assert code == 0


def test_a_run_broken_off_at_another_step_of_every_commit_ends_with_the_same_bits(tmp_path: Path) -> None:
    code, found = kill(tmp_path, "--points", "--rotate")
    assert (found["good"], found["commits_lost"], found["other_bits"]) == (1, 0, 0), found
    assert found["kills"] >= 5
    assert code == 0


def test_a_power_cut_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    code, found = kill(tmp_path, "--trials", "2", "--power-cut", "--seed", "2")
    assert (found["good"], found["commits_lost"], found["other_bits"]) == (2, 0, 0), found
    assert code == 0


@pytest.mark.parametrize("flush", ["fsync", "rename"])
def test_without_a_flush_the_harness_reports_losses(tmp_path: Path, flush: str) -> None:
    code, found = kill(tmp_path, "--trials", "2", "--break", flush)
    assert found["commits_lost"] > 0, found
    assert code == 1


def test_a_run_whose_raylet_is_killed_ends_truthfully_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    small = ["--words", "federation.rounds_per_stage=1", "federation.actors=1"]
    code, found = kill(tmp_path, "--ray", "1", "--fault", "raylet", "--seed", "1", *small)
    (trial,) = found["each"]
    assert (trial["kills"], trial["lost"], trial["same"], trial["left"]) == (1, 0, True, 0), found
    assert (trial["exits"], trial["told"]) == ([75, 0], True), found
    assert code == 0
