"""A deployment in containers, and the ways to break it."""

import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


def engine() -> str:
    """Why there can be no containers here; empty if there can."""
    if os.environ.get("FEDSTRATA_DOCKER") != "1":
        return "containers take minutes: make test-docker"
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        return "no Docker Engine answers"
    return ""


def compose_command() -> list[str]:
    """Compose v2 as a plugin, else v1."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]


class Stack:
    """One Compose project. files: beside docker-compose.yml, relative to the repository."""

    def __init__(self, project: str, files: list[str], words: str) -> None:
        self.project, self.words = project, words
        self.files = [word for file in ["docker-compose.yml", *files] for word in ("-f", file)]

    def compose(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(
            [*compose_command(), "-p", self.project, *self.files, *words],
            cwd=ROOT,
            env={**os.environ, "FEDSTRATA_FAULTS": str(HERE), "FEDSTRATA_WORDS": self.words, "DOCKER_BUILDKIT": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def container(self, service: str) -> str:
        found = docker("ps", "--all", "--quiet", "--filter", f"name={self.project}[-_]{service}[-_]")
        return found.split()[0]

    def execute(self, service: str, *words: str, given: str = "") -> str:
        """Runs a command inside a service's container."""
        return docker("exec", "-i", self.container(service), *words, given=given)

    def kill(self, service: str) -> None:
        """kill -9 of its first process from outside, which Docker takes for a crash and not for a stop."""
        before = self._started(service)
        pid = docker("inspect", "--format", "{{.State.Pid}}", self.container(service)).strip()
        subprocess.run(["kill", "-9", pid], check=True)
        wait(lambda: self._started(service) != before, 120, f"{service} to be started again")

    def _started(self, service: str) -> str:
        return docker("inspect", "--format", "{{.State.StartedAt}}", self.container(service))

    def network(self, service: str) -> str:
        return f"{self.project}_{service}"

    def events(self) -> list[dict[str, Any]]:
        """What the run folder tells, also when `run` has ended; a half-written last line is left out."""
        path = f"{self.container('run')}:/runs/first/events.jsonl"
        told = subprocess.run(["docker", "cp", path, "-"], capture_output=True, check=False)
        if told.returncode:
            return []  # not begun
        with tarfile.open(fileobj=io.BytesIO(told.stdout)) as packed:
            file = packed.extractfile(packed.getmembers()[0])
            assert file is not None
            return [json.loads(line) for line in file.read().decode().split("\n")[:-1]]

    def rounds(self) -> list[tuple[int, int]]:
        """The committed rounds in order, with those that were run again."""
        return [(event["stage"], event["round"]) for event in self.events() if event["event"] == "round"]

    def until(self, stage: int, round_: int, seconds: float = 900) -> None:
        """Waits until a round is committed."""
        wait(lambda: (stage, round_) in self.rounds(), seconds, f"stage {stage} round {round_}")

    def down(self) -> None:
        self.compose("--profile", "late", "down", "--volumes", "--timeout", "3", check=False)


def docker(*words: str, given: str = "") -> str:
    done = subprocess.run(["docker", *words], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr[-2000:]}"
    return done.stdout


def wait(holds: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(2)
