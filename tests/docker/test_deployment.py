"""A deployment in containers: built, run, broken in every way; every committed round is kept.

`make test-docker`; minutes. One deployment for all tests, in the order of its life.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.stack import HERE, Stack, docker, engine, wait

pytestmark = pytest.mark.skipif(bool(engine()), reason=engine())
FILES = ["docker-compose.demo.yml", str(Path("tests/docker/docker-compose.faults.yml"))]
WORDS = "federation.clients=4 strategy.name=finetune evaluate.shard=12"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Built and started; the fourth client is not there yet. FEDSTRATA_IMAGE names an image that is not built again."""
    stack = Stack("fedstrata-test", FILES, WORDS)
    stack.down()
    if "FEDSTRATA_IMAGE" not in os.environ:
        stack.compose("build")
    stack.compose("up", "--detach", "--no-build")
    try:
        yield stack
    finally:
        stack.down()


def test_no_secret_lies_in_the_image(stack: Stack) -> None:
    layers = docker(
        "run",
        "--rm",
        "--entrypoint",
        "sh",
        os.environ.get("FEDSTRATA_IMAGE", "fedstrata:latest"),
        "-c",
        "id -u; find /keys /data /runs -type f",
    )
    assert layers.split() == ["49999"]


def test_a_clients_network_shows_the_fleet_api_and_nothing_else(stack: Stack) -> None:
    wait(lambda: bool(stack.events()), 900, "the run to begin")
    address = docker(
        "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", stack.container("superlink")
    )
    probe = (HERE / "probe.py").read_text(encoding="utf-8")
    told = stack.execute("client-0", "env", f"SUPERLINK_IP={address.strip()}", "python", "-", given=probe)
    found = json.loads(told)
    assert found.pop("fleet") not in (403, 404)  # reaches Flower, which asks for a signature
    assert found.pop("512 MB") == 413
    assert found.pop("plain HTTP") == 400
    for question in ("superlink", "its address", "another client", "outside"):
        assert found.pop(question) is False, question
    assert set(found.values()) == {403}, found


def test_every_committed_round_is_kept_whatever_dies(stack: Stack) -> None:
    kept: list[tuple[int, int]] = []

    def committed() -> None:
        """No round that was committed is gone."""
        now = stack.rounds()
        assert now[: len(kept)] == kept
        kept[:] = now

    stack.until(1, 1)
    committed()
    stack.kill("client-1")
    stack.until(1, 2)
    committed()
    stack.kill("superlink")
    stack.until(2, 1)
    committed()
    cut = (stack.network("client-2"), stack.container("client-2"))
    docker("network", "disconnect", *cut)
    stack.until(2, 2)
    docker("network", "connect", *cut)
    committed()
    stack.compose("--profile", "late", "up", "--detach", "--no-build", "--no-recreate", "client-3")
    stack.kill("server")
    stack.until(3, 2)
    committed()
    wait(lambda: any(event["event"] == "run_finished" for event in stack.events()), 900, "the end")
    assert sorted(set(stack.rounds())) == [(stage, round_) for stage in (1, 2, 3) for round_ in (1, 2)]
    (end,) = [event for event in stack.events() if event["event"] == "run_finished"][-1:]
    assert end["status"] == "completed"
    assert [2 in trained for stage, trained in trained_in(stack) if stage == 2][-1:] == [False]  # it was cut off
    assert {0, 1, 2, 3} == set().union(*[trained for stage, trained in trained_in(stack) if stage == 3])


def trained_in(stack: Stack) -> list[tuple[int, set[int]]]:
    """The stage and who took part, of each round."""
    rounds = [event for event in stack.events() if event["event"] == "round"]
    return [(event["stage"], {row["client"] for row in event["participants"]}) for event in rounds]


def test_the_supervisor_ends_with_the_table_and_exit_code_0(stack: Stack) -> None:
    assert docker("wait", stack.container("run")).strip() == "0"
    assert "names" in stack.compose("logs", "--no-color", "run")
