"""The Ray grid of a run: it tells of every unit when it comes in, so that what is done is kept if the server dies."""

from collections.abc import Callable, Sequence

from flwr.app import Message

from fedstrata.server.raygrid import RayGrid

Arrived = Callable[[Sequence[Message], Sequence[Message]], None]  # (what was asked, what came)


class ArrivingRayGrid(RayGrid):
    """A RayGrid with a listener: called once per finished unit, whatever came of it, in the order of arrival.

    The large arrays of what came then lie in Ray's shared memory, which is free again when nobody holds them.
    """

    arrived: Arrived | None = None

    @property
    def streams(self) -> bool:
        return self.arrived is not None

    def tell(self, asked: Sequence[Message], came: Sequence[Message]) -> None:
        if self.arrived is not None:
            self.arrived(asked, came)
