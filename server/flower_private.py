"""The private corners of Flower that a grid of our own needs, all in one place; a test names the version."""

from flwr.app import Error, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

FLOWER_VERSION = "1.41.0"

__all__ = [
    "FLOWER_VERSION",
    "SUPERLINK_NODE_ID",
    "Run",
    "as_error",
    "become_server",
    "set_message_id",
    "with_content",
]


def become_server() -> Run:
    """Lets this process create instruction messages, as Flower's own ServerApp process does; returns an empty run."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    return Run.create_empty(run_id=1)


def set_message_id(metadata: object, message_id: str) -> None:
    """Flower's SuperLink gives messages their ids; a grid without one does it here."""
    metadata.__dict__["_message_id"] = message_id


def with_content(message: Message, content: RecordDict) -> Message:
    """The same message, ids and all, with another content."""
    return make_message(message.metadata, content)


def as_error(message: Message, error: Error) -> Message:
    """The same message, ids and all, with an error in the place of its content."""
    return make_message(message.metadata, error=error)
