"""The simulation's grid: Ray actors, each with one base model, serve cohorts of clients.

Every distinct payload goes into Ray's object store once. Actors take the next unit as they get free; replies are
handed back in the order of the messages, so neither the number of actors nor their speed shows in the result. A dead
actor is replaced and its unit served again: a client-round is a pure function of its message.
"""

import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from flwr.app import Context, Error, Message, RecordDict
from ray.exceptions import RayActorError, RayTaskError

from fedstrata.core.errors import BadInput
from fedstrata.server.flower_private import with_content
from fedstrata.server.grids import CLIENT_APP, LocalGrid, answer, load_app, units

TRIES = 3  # of one unit, when its actor dies under it


class Worker:
    """Lives in an actor: the ClientApp and, in its module, the base model."""

    def __init__(self, client_app: str, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._app = load_app(client_app)

    def serve(
        self, light: Sequence[Message], keys: Sequence[dict[str, int]], contexts: Sequence[Context], *payloads: Any
    ) -> tuple[list[Message], list[RecordDict]]:
        """Puts the payloads back into the messages and serves them; returns replies and the contexts' states."""
        for message, names in zip(light, keys, strict=True):
            for name, index in names.items():
                message.content[name] = payloads[index]
        replies = answer(self._app, light, contexts)
        return replies, [context.state for context in contexts]


class RayGrid(LocalGrid):
    """Our Grid over Ray actors."""

    def __init__(
        self,
        clients: int,
        cohort_size: int,
        actors: int,
        threads: int = 1,
        gpus: bool = False,
        address: str = "",
        client_app: str = CLIENT_APP,
    ) -> None:
        """`gpus`: whether the cluster's GPUs are shared out among the actors, at most one to each."""
        super().__init__(clients)
        self.cohort_size = cohort_size
        start_ray(actors, address)
        found = ray.cluster_resources() if gpus else {}  # type: ignore[no-untyped-call]
        share = min(1.0, found.get("GPU", 0.0) / actors)
        self._make = ray.remote(num_cpus=1, num_gpus=share)(Worker).options(max_restarts=0)
        self._arguments = (client_app, threads)
        self._actors = [self._new_actor() for _ in range(actors)]

    def _new_actor(self) -> Any:
        return self._make.remote(*self._arguments)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        numbered = self._number(messages)
        waiting = units(numbered, self.cohort_size)[::-1]
        tries = {id(unit): 0 for unit in waiting}
        store, done = _Store(), dict[str, Message]()
        running: dict[Any, tuple[list[Message], int]] = {}
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting or running:
            while waiting and len(running) < len(self._actors):
                unit = waiting.pop()
                free = next(i for i in range(len(self._actors)) if i not in {place for _, place in running.values()})
                running[self._submit(unit, self._actors[free], store)] = (unit, free)
            ready, _ = ray.wait(list(running), timeout=_left(deadline))
            if not ready:
                self._abandon([place for _, place in running.values()])
                break  # the caller sees which replies are missing
            unit, place = running.pop(ready[0])
            replies = self._collect(ready[0], unit, place)
            tries[id(unit)] += 1
            if replies is None and tries[id(unit)] < TRIES:
                waiting.append(unit)
                continue
            for message, reply in zip(unit, replies or _lost(unit), strict=True):
                done[message.metadata.message_id] = reply
        return [done[m.metadata.message_id] for m in numbered if m.metadata.message_id in done]

    def _submit(self, unit: Sequence[Message], actor: Any, store: "_Store") -> Any:
        light, keys, payloads = store.strip(unit)
        contexts = [self.contexts[message.metadata.dst_node_id] for message in unit]
        return actor.serve.remote(light, keys, contexts, *payloads)

    def _collect(self, result: Any, unit: Sequence[Message], place: int) -> list[Message] | None:
        """A unit's replies; None when its actor died, which is then replaced."""
        try:
            replies, states = ray.get(result)
        except RayActorError:
            self._actors[place] = self._new_actor()
            return None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, BadInput):
                raise BadInput(str(cause)) from None
            return [Message(Error(2, f"{type(cause).__name__}: {cause}"), reply_to=message) for message in unit]
        for message, state in zip(unit, states, strict=True):
            self.contexts[message.metadata.dst_node_id].state = state
        return list(replies)

    def _abandon(self, places: Iterable[int]) -> None:
        """Actors that missed the deadline are ended, so that they do not hold up the next exchange."""
        for place in places:
            ray.kill(self._actors[place])
            self._actors[place] = self._new_actor()

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        ray.shutdown()


class _Store:
    """Object-store references of the records of one exchange: one put per distinct ArrayRecord."""

    def __init__(self) -> None:
        self._references: dict[int, Any] = {}
        self._kept: list[Any] = []  # an id is unique only while its object lives

    def strip(self, unit: Sequence[Message]) -> tuple[list[Message], list[dict[str, int]], list[Any]]:
        """The unit's messages without arrays; per message {record name: index}; the payloads' references."""
        light, keys, payloads = [], [], []
        for message in unit:
            names = {}
            for name, record in message.content.array_records.items():
                reference = self._put(record)
                if reference not in payloads:
                    payloads.append(reference)
                names[name] = payloads.index(reference)
            rest = RecordDict({k: message.content[k] for k in message.content if k not in names})
            light.append(with_content(message, rest))
            keys.append(names)
        return light, keys, payloads

    def _put(self, record: Any) -> Any:
        if id(record) not in self._references:
            self._references[id(record)] = ray.put(record)
            self._kept.append(record)
        return self._references[id(record)]


def start_ray(actors: int, address: str) -> None:
    """Joins the cluster at `address`, or starts Ray on this machine, closed to others by a token."""
    if ray.is_initialized():
        return
    if address:
        ray.init(address=address, log_to_driver=False)
        return
    ray.init(
        num_cpus=actors,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=True,
        logging_level=logging.ERROR,
    )


def _lost(unit: Sequence[Message]) -> list[Message]:
    return [Message(Error(2, f"the actor died {TRIES} times"), reply_to=message) for message in unit]


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
