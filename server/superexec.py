"""Flower's SuperExec on a client's host, within two bounds: it starts ClientApps alone, and one at a time.

Flower's own starts whatever it is sent, also kinds of tasks that run a bundle's code, and a process per message: on a
host that is too slow to start one before its claim ends, it starts the next beside it, and the next.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from fedstrata.core import flowerapp
from fedstrata.server.clientapp import OWN
from fedstrata.server.flower_private import (
    ExecutionSpec,
    LaunchResult,
    SubprocessExecutor,
    TaskType,
    serve_superexec,
)


class OneAtATime(SubprocessExecutor):
    """Takes a message on when the process of the last one has ended."""

    def __init__(self, command: Sequence[str]) -> None:
        """command: what serves one message; it gets the arguments of `flwr-clientapp`."""
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None

    def get_eligible_capacity(self, *_: Any, **__: Any) -> tuple[set[TaskType], set[str]]:
        """What is to be asked for: ClientApps, or nothing while one runs."""
        busy = self._process is not None and self._process.poll() is None
        return (set() if busy else {TaskType.CLIENT_APP}), set()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Starts the process of one message; another kind of task is not started, asked for or not."""
        if spec.task_type != TaskType.CLIENT_APP:
            return LaunchResult.failed(f"this node serves ClientApps alone, not {spec.task_type}")
        given = ["--runtime-api-address", spec.runtime_api_address, "--insecure", "--token", spec.token]
        self._process = subprocess.Popen([*self._command, *given, "--parent-pid", str(os.getpid())])
        return LaunchResult.accepted()


def main() -> None:
    """Takes the arguments of `flower-superexec`; the SuperNode is on this host's loopback."""
    os.environ[OWN] = flowerapp.own_hash()
    serve_superexec(OneAtATime([sys.executable, "-m", "fedstrata.server.clientapp"]))


if __name__ == "__main__":
    main()
