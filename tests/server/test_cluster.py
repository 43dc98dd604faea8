"""A federation over a real Ray cluster: two nodes on this machine, closed by a token, one lost in mid-round."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fedstrata.server import raystart

HERE = Path(__file__).parent


def test_a_node_lost_in_mid_round_changes_nothing(tmp_path: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "c" * 64, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "two_nodes.py"), str(tmp_path)]
    ended = subprocess.run(
        command, env={**os.environ, **token}, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout.strip().splitlines()[-1])
    assert len(seen["nodes"]) == 2
    assert seen["actors"] == seen["nodes"]  # one on each
    assert seen["hit"] == 1
    assert len(seen["left"]) == 1
    assert seen["cluster lives"]  # we left it; it is not ours to end
    assert seen["alone"]["status"] == seen["fault"]["status"] == "completed"
    for key in ("final_state_sha256", "last", "bytes_up", "bytes_down", "bytes_eval", "skipped_rounds", "rejected"):
        assert seen["fault"][key] == seen["alone"][key], key
    assert seen["swept"] == [[0, seen["alone"]["final_state_sha256"]]] * 2


def test_the_private_corners_are_those_of_the_installed_ray() -> None:
    assert raystart.ray.__version__ == raystart.RAY_VERSION
