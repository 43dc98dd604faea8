"""The private corners of Flower that a grid of our own needs, all in one place; a test names the version."""

from collections.abc import Callable
from importlib import import_module
from pkgutil import resolve_name

from flwr.app import Error, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.constant import TaskType
from flwr.supercore.run import Run
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor
from flwr.supercore.task_identity import TaskIdentity

FLOWER_VERSION = "1.41.0"

__all__ = [
    "FLOWER_VERSION",
    "SUPERLINK_NODE_ID",
    "ExecutionSpec",
    "LaunchResult",
    "Run",
    "SubprocessExecutor",
    "TaskType",
    "as_error",
    "become_server",
    "serve_superexec",
    "serve_task",
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


def serve_superexec(executor: SubprocessExecutor) -> None:
    """Flower's SuperExec, with this process's arguments; what it takes on is started by `executor`."""
    from flwr.supercore.cli import flower_superexec

    _replace("flwr.supercore.superexec.run_superexec", "get_executor", lambda *_, **__: executor)
    flower_superexec()


def serve_task(check: Callable[[bytes], None], app: str) -> None:
    """Flower's ClientApp process, with this process's arguments, for one message.

    The run's bundle goes to `check` and nowhere else: it is not unpacked, and what serves the message is `app`, an
    installed `module:name`, whatever the bundle asks for. What `check` raises goes back as an error reply.
    """
    from flwr.supernode.cli import flwr_clientapp

    process = "flwr.supernode.runtime.run_clientapp"
    _replace(process, "install_from_fab", lambda bundle, **_: check(bundle))
    _replace(process, "get_load_client_app_fn", lambda **_: lambda *_: resolve_name(app))
    flwr_clientapp()


def _replace(module: str, name: str, value: object) -> None:
    """Raises AttributeError where Flower has no such name any more: then `value` would be called by nobody."""
    there = import_module(module)
    getattr(there, name)
    setattr(there, name, value)
