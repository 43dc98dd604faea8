"""The private corners of Flower that a grid of our own needs, all in one place; a test names the version."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.user_config import UserConfig
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import user_config_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes as key_bytes
from flwr.supercore.run import Run
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor
from flwr.supercore.task_identity import TaskIdentity

from fedstrata.core.errors import FedstrataError

FLOWER_VERSION = "1.41.0"

__all__ = [
    "FLOWER_VERSION",
    "SUPERLINK_NODE_ID",
    "ExecutionSpec",
    "LaunchResult",
    "NodeInfo",
    "NodeStatus",
    "Run",
    "SubprocessExecutor",
    "TaskType",
    "as_error",
    "become_server",
    "key_bytes",
    "list_nodes",
    "run_settings",
    "serve_superexec",
    "serve_task",
    "set_message_id",
    "simulated",
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


def simulated(run: Run) -> bool:
    """Whether Flower simulates the run's nodes, which then have no keys."""
    return run.primary_task_type == TaskType.SIMULATION


def list_nodes(address: str, authority: Path | None) -> list[NodeInfo]:
    """All nodes that were ever registered, with their public keys, which `flwr supernode ls` does not show.

    authority: ca.crt; None: plain HTTP. Raises FedstrataError where the SuperLink does not answer.
    """
    with _control(address, authority) as client:
        return list(client.ListNodes(ListNodesRequest()).nodes_info)


def run_settings(address: str, authority: Path | None, run: int) -> UserConfig:
    """The run config with which a run was submitted, which `flwr ls` does not show. Raises as `list_nodes` does."""
    with _control(address, authority) as client:
        return user_config_from_proto(client.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].override_config)


@contextmanager
def _control(address: str, authority: Path | None) -> Iterator[ControlHttpClient]:
    client = ControlHttpClient.from_server_address(
        address,
        insecure=authority is None,
        root_certificates=authority.read_bytes() if authority else None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield client
    except (httpx.HTTPError, ValueError) as error:
        raise FedstrataError(f"{address}: the control API does not answer as it should: {error}") from error
    finally:
        client.close()


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
