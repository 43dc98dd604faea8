"""Who does a sweep's jobs: one process here, or several at a time, each held by a Ray actor.

Ray spreads the actors over what it has: the GPUs of this machine, or the nodes of the cluster that the sweep's
`federation.ray_address` names, where the folders must lie at the same paths on all nodes.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from fedstrata.server.placement import Wanted, place
from fedstrata.server.raystart import check_ray, start_ray, stop_ray
from fedstrata.server.worker import Answer, Job, Worker

GOODBYE = 5.0  # seconds that an actor has to close


class Hand(Protocol):
    """Does one job after another."""

    def run(self, job: Job) -> Answer:
        """Waits until the job is done."""

    def interrupt(self) -> None:
        """The job that it is at is committed and ends; there are no others."""

    def close(self) -> None:
        """Ends it once it has nothing to do."""


class Actor:
    """The other side of a Ray actor: a `Worker` on the actor's node."""

    def __init__(self, log: Path, here: Path) -> None:
        self.worker = Worker(log, here)

    def run(self, job: Job) -> Answer:
        """As the worker's."""
        return self.worker.run(job)

    def interrupt(self) -> None:
        """As the worker's; called while `run` is."""
        self.worker.interrupt()

    def close(self) -> None:
        """As the worker's."""
        self.worker.close()


class Remote:
    """A worker in a Ray actor: started when there is something to do, and again when it died."""

    def __init__(self, make: Callable[[], Any]) -> None:
        """make: starts the actor."""
        self._make, self._actor = make, None
        self.ended, self.lock = False, threading.Lock()

    def run(self, job: Job) -> Answer:
        """Waits until the job is done. An actor that dies over it has failed it.

        Raises:
            Interrupted: Ray itself has died.
        """
        with self.lock:
            if self.ended:
                return Answer(75, "interrupted before it began")
            self._actor = actor = self._actor or self._make()
        try:
            answer: Answer = ray.get(actor.run.remote(job))
        except RayActorError as error:
            check_ray()
            self._actor = None
            return Answer(1, f"its actor died: {str(error).splitlines()[0]}")
        except RayTaskError as error:
            return Answer(1, f"{type(error.cause).__name__}: {error.cause}")
        return answer

    def interrupt(self) -> None:
        """The run that it is at commits and ends."""
        with self.lock:
            self.ended = True
            if self._actor is not None:
                self._actor.interrupt.remote()

    def close(self) -> None:
        """Ends the actor once it has nothing to do."""
        if self._actor is not None:
            with suppress(RayError):  # it has died: so it is closed
                ray.get(self._actor.close.remote(), timeout=GOODBYE)
            ray.kill(self._actor)


@contextmanager
def hands(folder: Path, jobs: int, address: str = "") -> Iterator[list[Hand]]:
    """As many as `jobs`; what goes wrong in their processes is written to `folder`/worker-<number>.log.

    Raises:
        BadInput: the cluster cannot be joined.
    """
    logs = [folder.resolve() / f"worker-{number}.log" for number in range(jobs)]
    if jobs == 1:
        yield [Worker(logs[0])]
        return
    start_ray(jobs, address)
    try:
        wanted = Wanted(actors=jobs, local=jobs, device="auto", address=address)
        _, options = place(wanted, ray.cluster_resources())  # type: ignore[no-untyped-call]
        kind = ray.remote(Actor).options(**options, max_concurrency=2)  # to be interrupted while it runs
        yield [Remote(lambda log=log: kind.remote(log, Path.cwd())) for log in logs]  # type: ignore[misc]
    finally:
        stop_ray()
