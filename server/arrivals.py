"""The Ray grid of a run: it tells of every unit when it comes in, so that what is done is kept if the server dies."""

from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import Message

from fedstrata.server.raygrid import RayGrid

Arrived = Callable[[Sequence[Message], Sequence[Message]], None]  # (what was asked, what came)


class ArrivingRayGrid(RayGrid):
    """A RayGrid with a listener."""

    arrived: Arrived | None = None

    def _collect(self, result: Any, unit: Sequence[Message], place: int) -> list[Message] | None:
        replies = super()._collect(result, unit, place)
        if replies is not None and self.arrived is not None:
            self.arrived(unit, replies)
        return replies
