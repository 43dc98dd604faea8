"""The actors of a simulation: each holds a ClientApp and one base model; who dies is replaced."""

import os
import re
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from typing import Any

import ray
from flwr.app import ArrayRecord
from ray.exceptions import RayError, RayTaskError

from fedstrata.core.errors import FedstrataError
from fedstrata.server.flower_private import become_server
from fedstrata.server.grids import answer, client_context, load_app
from fedstrata.server.parcels import Parcel, pack, unpack

STARTS = 3  # of actors in a row that may die before they are up
EQUAL = ("fedstrata", "flwr", "torch")  # packages of which all nodes must hold the same version


class Worker:
    """Lives in an actor: the ClientApp and, in its module, the base model."""

    def __init__(self, client_app: str, clients: int, threads: int) -> None:
        self._name, self._clients, self._threads = client_app, clients, threads
        self._exchange, self._known = -1, dict[int, ArrayRecord]()

    def hello(self) -> tuple[str, list[str]]:
        """Loads the ClientApp; returns the node that this actor runs on, and the versions of `EQUAL`."""
        os.environ["OMP_NUM_THREADS"] = str(self._threads)
        become_server()
        self._app = load_app(self._name)
        return ray.get_runtime_context().get_node_id(), versions()

    def serve(self, exchange: int, numbers: Sequence[int], unit: Parcel, *payloads: Parcel) -> tuple[Parcel, Parcel]:
        """Serves (messages, their clients' states or None); returns replies and states, each in a parcel.

        `payloads`: the exchange's array records that the messages refer to, by their `numbers`.
        """
        if exchange != self._exchange:
            self._exchange = exchange
            self._known.clear()
        for number, payload in zip(numbers, payloads, strict=True):
            if number not in self._known:
                self._known[number] = unpack(payload)
        messages, states = unpack(unit, self._known.__getitem__)
        nodes = [message.metadata.dst_node_id for message in messages]
        contexts = [client_context(node, self._clients, state) for node, state in zip(nodes, states, strict=True)]
        replies = answer(self._app, messages, contexts)
        return pack(replies), pack([context.state if len(context.state) else None for context in contexts])


class Crew:
    """Actors that are free, and those that will be: they start, or finish what nobody waits for any more."""

    def __init__(self, make: Callable[[], Any], size: int) -> None:
        """`make`: starts one actor."""
        self._make, self._size, self._lost = make, size, 0
        self._busy: dict[Any, Any] = {}  # reference → the actor that is free when it is ready
        self.free: list[Any] = []
        self.nodes: dict[Any, str] = {}  # actor → the node that it runs on
        for _ in range(size):
            self.hire()

    @property
    def coming(self) -> Collection[Any]:
        """References to wait for."""
        return self._busy.keys()

    def hire(self) -> None:
        """A new actor begins to start."""
        actor = self._make()
        self._busy[actor.hello.remote()] = actor

    def dismiss(self, actor: Any) -> None:
        """Ends an actor that is dead or takes too long; another one takes its place."""
        ray.kill(actor)
        self.nodes.pop(actor, None)
        self.hire()

    def leave(self, reference: Any, actor: Any) -> None:
        """An actor whose result nobody waits for; it is free again when it is done."""
        self._busy[reference] = actor

    def arrive(self, reference: Any) -> None:
        """A reference of `coming` is ready. Raises FedstrataError when actors cannot start."""
        actor = self._busy.pop(reference)
        try:
            found = ray.get(reference)
        except RayTaskError as error:
            if actor not in self.nodes:
                raise FedstrataError(_cannot_start(error)) from None
            self.free.append(actor)
        except RayError as error:
            self._died(actor, error)
        else:
            self._up(actor, found)

    def _up(self, actor: Any, found: Any) -> None:
        if actor not in self.nodes:
            node, theirs = found
            if theirs != versions():
                ours = ", ".join(f"{name} {here}" for name, here in zip(EQUAL, versions(), strict=True))
                raise FedstrataError(f"Ray node {node[:8]}: must hold {ours} as this one does, holds {theirs}")
            self.nodes[actor], self._lost = node, 0
        self.free.append(actor)

    def _died(self, actor: Any, error: RayError) -> None:
        if actor not in self.nodes:
            self._lost += 1
            if self._lost >= STARTS * self._size:
                raise FedstrataError(f"{self._lost} actors in a row died while they started: {error}") from None
        self.dismiss(actor)

    def close(self) -> None:
        """Ends all actors."""
        for actor in {*self.free, *self._busy.values(), *self.nodes}:
            ray.kill(actor)


def versions() -> list[str]:
    """Of the packages in `EQUAL`, here."""
    return [version(name) for name in EQUAL]


def _cannot_start(error: RayTaskError) -> str:
    """The reason; where a node lacks our package, Ray's own text ends with it."""
    cause = error.cause
    lines = str(cause).strip().splitlines() or [""]
    reason = lines[-1].strip() if len(lines) > 1 else f"{type(cause).__name__}: {lines[0]}"
    where = re.search(r"\bip=([^,)\s]+)", str(error))
    return f"an actor cannot start{f' on {where[1]}' if where else ''}: {reason}"
