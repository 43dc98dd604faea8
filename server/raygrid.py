"""The simulation's grid: Ray actors, each with one base model, serve cohorts of clients.

Every distinct payload goes into Ray's object store once. Actors take the next unit as they get free; replies are
handed back in the order of the messages, so neither the number of actors nor their speed shows in the result. An actor
that dies or takes too long is replaced and its unit served again: a client-round is a pure function of its message.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from flwr.app import ArrayRecord, Error, Message
from ray.exceptions import RayActorError, RayError, RayTaskError

from fedstrata.core.errors import BadInput
from fedstrata.server.crew import Crew, Worker
from fedstrata.server.grids import CLIENT_APP, LocalGrid, units
from fedstrata.server.parcels import pack, unpack
from fedstrata.server.placement import Wanted, place
from fedstrata.server.raystart import check_ray, death, start_ray, stop_ray

TRIES = 3  # of one unit, when its actor dies under it or takes too long
FOREVER = float("inf")
PULSE = 1.0  # seconds after which a wait looks whether Ray still lives


class RayGrid(LocalGrid):
    """Our Grid over Ray actors."""

    def __init__(
        self,
        clients: int,
        cohort_size: int,
        wanted: Wanted,
        cohort_timeout: float = 0.0,
        client_app: str = CLIENT_APP,
    ) -> None:
        """`cohort_timeout`: seconds an actor may take for one unit; 0: no limit.

        Raises:
            BadInput: the cluster cannot be joined, or has no GPU for a run on one.
        """
        super().__init__(clients)
        self.cohort_size, self.cohort_timeout = cohort_size, cohort_timeout
        self.exchanges = 0
        start_ray(wanted.local, wanted.address)
        try:
            self.actors, options = place(wanted, ray.cluster_resources())  # type: ignore[no-untyped-call]
        except BadInput:
            stop_ray()
            raise
        make = ray.remote(Worker).options(**options)
        self.crew = Crew(lambda: make.remote(client_app, clients, wanted.threads), self.actors)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        numbered = self._number(messages)
        self.exchanges += 1
        done = _Exchange(self, numbered, FOREVER if timeout is None else time.monotonic() + timeout).run()
        return [done[m.metadata.message_id] for m in numbered if m.metadata.message_id in done]

    @property
    def streams(self) -> bool:
        """Whether somebody takes the replies as they come and lets go of their arrays: they need no copy then."""
        return False

    def tell(self, asked: Sequence[Message], came: Sequence[Message]) -> None:
        """Called for every unit when it is finished, in the order in which they finish."""

    def close(self) -> None:
        if not death():
            self.crew.close()
        stop_ray()


@dataclass(eq=False)
class _Unit:
    """What one call serves, and what went wrong with it so far."""

    messages: Sequence[Message]
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Running:
    """A unit on an actor; `until`: when it will have taken too long."""

    unit: _Unit
    actor: Any
    until: float


class _Exchange:
    """One call of `send_and_receive`: the units that wait, those that run, and the replies that came."""

    def __init__(self, grid: RayGrid, messages: Sequence[Message], deadline: float) -> None:
        self.grid, self.crew, self.deadline = grid, grid.crew, deadline
        self.waiting = [_Unit(unit) for unit in units(messages, grid.cohort_size)][::-1]
        self.running: dict[Any, _Running] = {}
        self.done: dict[str, Message] = {}
        self.store = _Store()

    def run(self) -> dict[str, Message]:
        """Request id → reply; behind the deadline the caller sees which ones are missing.

        Raises:
            Interrupted: Ray itself has died.
        """
        try:
            while (self.waiting or self.running) and self._step():
                pass
        except Exception:
            check_ray()  # then that is the reason, whatever broke first
            raise
        finally:
            for reference, running in self.running.items():
                self.crew.leave(reference, running.actor)
        return self.done

    def _step(self) -> bool:
        """Hands out what can be, and takes in what comes next; whether there is time left."""
        check_ray()  # to put or fetch an object without Ray ends this process on the spot
        while self.waiting and self.crew.free:
            self._submit(self.waiting.pop(), self.crew.free.pop())
        until = min([self.deadline, *(running.until for running in self.running.values())])
        patience = min(PULSE, max(0.0, until - time.monotonic()))
        ready, _ = ray.wait([*self.running, *self.crew.coming], timeout=patience)
        check_ray()
        if ready and ready[0] in self.running:
            self._take(ready[0], self.running.pop(ready[0]))
        elif ready:
            self.crew.arrive(ready[0])
        elif time.monotonic() >= self.deadline:
            self._give_up()
            return False
        else:
            self._hurry()
        return True

    def _submit(self, unit: _Unit, actor: Any) -> None:
        states = [self.grid.state(message.metadata.dst_node_id) for message in unit.messages]
        numbers = dict[int, Any]()
        parcel = pack((unit.messages, states), lambda record: self.store.number(record, numbers))
        reference = actor.serve.remote(self.grid.exchanges, list(numbers), parcel, *numbers.values())
        patience = self.grid.cohort_timeout or FOREVER
        self.running[reference] = _Running(unit, actor, time.monotonic() + patience)

    def _take(self, reference: Any, running: _Running) -> None:
        """A unit has been served, well or badly."""
        unit, actor = running.unit, running.actor
        try:
            served, states = ray.get(reference)
            replies = unpack(served, lend=self.grid.streams)
        except RayTaskError as error:
            self.crew.free.append(actor)
            self._settle(unit, _failed(unit, error))
        except RayError as error:  # the actor is gone, or the node with its result
            self.crew.dismiss(actor)
            died = isinstance(error, RayActorError)
            self._again(unit, "the actor died" if died else f"its replies were lost ({type(error).__name__})")
        else:
            self.crew.free.append(actor)
            for message, state in zip(unit.messages, unpack(states), strict=True):
                self.grid.remember(message.metadata.dst_node_id, state)
            self._settle(unit, replies)

    def _hurry(self) -> None:
        """Actors that take too long are replaced, and their units served again."""
        late = [reference for reference, running in self.running.items() if running.until <= time.monotonic()]
        for reference in late:
            running = self.running.pop(reference)
            self.crew.dismiss(running.actor)
            self._again(running.unit, f"it took longer than federation.cohort_timeout = {self.grid.cohort_timeout:g} s")

    def _give_up(self) -> None:
        """Actors that missed the deadline are replaced, so that they do not hold up the next exchange."""
        for running in self.running.values():
            self.crew.dismiss(running.actor)
        self.running.clear()

    def _again(self, unit: _Unit, why: str) -> None:
        unit.failures.append(why)
        if len(unit.failures) < TRIES:
            self.waiting.append(unit)
            return
        reason = "; ".join(f"{what} {times} times" for what, times in Counter(unit.failures).items())
        self._settle(unit, [Message(Error(2, reason), reply_to=message) for message in unit.messages])

    def _settle(self, unit: _Unit, replies: Sequence[Message]) -> None:
        for message, reply in zip(unit.messages, replies, strict=True):
            self.done[message.metadata.message_id] = reply
        self.grid.tell(unit.messages, replies)


class _Store:
    """The array records of one exchange in Ray's object store: one put per distinct record."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._kept: list[tuple[ArrayRecord, Any]] = []  # an id is unique only while its object lives

    def number(self, record: ArrayRecord, used: dict[int, Any]) -> int:
        """The record's number; number and reference are added to `used`."""
        number = self._numbers.get(id(record))
        if number is None:
            number = self._numbers[id(record)] = len(self._kept)
            self._kept.append((record, ray.put(pack(record))))
        used[number] = self._kept[number][1]
        return number


def _failed(unit: _Unit, error: RayTaskError) -> list[Message]:
    """Error replies. Raises BadInput when that is what the client says: it would fail every client alike."""
    cause = error.cause
    if isinstance(cause, BadInput):
        raise BadInput(str(cause)) from None
    return [Message(Error(2, f"{type(cause).__name__}: {cause}"), reply_to=message) for message in unit.messages]
