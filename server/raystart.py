"""Ray's beginning and end: a Ray of our own, closed to others by a token, or an existing cluster that we join.

Ray's servers listen on all interfaces, and whoever reaches them may run code; so a Ray that we start answers only to a
token of its own, which lives in the environment of its processes and nowhere else. In a cluster that we join the
user's own settings hold (RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token).
"""

import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import grpc  # type: ignore[import-untyped]
import ray
from ray._private.gcs_utils import create_gcs_channel
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationMode,
    AuthenticationTokenLoader,
    Config,
    get_authentication_mode,
)
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import RayError

from fedstrata.core.errors import BadInput, FedstrataError, Interrupted
from fedstrata.server import guard

RAY_VERSION = "2.55.1"  # of which the private corners above are; a test names it
KEY = "federation.ray_address"
ABANDONED = threading.Event()  # a dead Ray was left behind: only `os._exit` ends this process with a code of ours
DEAD = "Ray's raylet has died"
PATIENCE = 10.0  # seconds in which a cluster must answer


def start_ray(cpus: int, address: str = "") -> None:
    """Joins the cluster at `address`, or starts Ray on this machine; does nothing where Ray is up already.

    Raises:
        BadInput: no cluster answers at the address, or it refuses us.
        FedstrataError: Ray does not start on this machine, or cannot be closed by a token.
    """
    if ray.is_initialized():
        return
    if address:
        _join(address)
    else:
        _begin(cpus)


def death() -> str:
    """What became of the raylet that was started here, if it died; empty while it lives.

    Ray itself would end this process from within, without a word in the run folder. The raylet of a cluster that we
    joined is not our child; when it dies, that is what happens.
    """
    codes = [raylet.poll() for raylet in _raylets()]
    return next((f"{DEAD} (exit code {code})" for code in codes if code is not None), "")


def _raylets() -> list[subprocess.Popen[bytes]]:
    node = ray._private.worker._global_node
    return [raylet.process for raylet in node.all_processes.get("raylet", [])] if node else []


def _watch(raylet: subprocess.Popen[bytes]) -> None:
    """Says it at once: the next object that is put, fetched or let go of may end this process before `check_ray`."""
    if raylet.wait() not in (0, -signal.SIGTERM) and not guard.tell(reason=DEAD):
        print(f"{DEAD}; the last commit stands: fedstrata resume goes on from it", file=sys.stderr, flush=True)


def check_ray() -> None:
    """Raises Interrupted when nothing is served any more."""
    if reason := death():
        raise Interrupted(reason)


def stop_ray() -> None:
    """Ends the Ray that was started here, or leaves the cluster, which goes on without us."""
    if death():
        _abandon()
        return
    ray.shutdown()
    if not ray.is_initialized():
        _read_again()


def _abandon() -> None:
    """Ends what a dead raylet left running. Ray's own shutdown, now or at exit, would end this process with code 1."""
    node: Any = ray._private.worker._global_node
    node.kill_all_processes(check_alive=False, allow_graceful=False)
    ABANDONED.set()


def _begin(cpus: int) -> None:
    """Ray on this machine; its token dies with it."""
    with _environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        _read_again()
        if get_authentication_mode() != AuthenticationMode.TOKEN:
            raise FedstrataError(f"Ray {ray.__version__} does not ask for a token; it is not started without one")
        _init(cpus)
    for raylet in _raylets():
        threading.Thread(target=_watch, args=(raylet,), daemon=True).start()


def _init(cpus: int) -> None:
    """Ray waits half a minute for its own daemons, which is not enough on a busy machine: it is started once more."""
    for last in (False, True):
        try:
            ray.init(
                address="local",  # without it Ray would join whatever cluster RAY_ADDRESS or /tmp/ray names
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=True,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray has no type of its own for it
            ray.shutdown()
            if last:
                raise FedstrataError(f"Ray does not start on this machine: {error}") from error


def _join(address: str) -> None:
    if urlsplit(address).scheme == "ray":
        rule = "host:port or auto, with fedstrata on one of the cluster's nodes (not Ray Client)"
        raise BadInput(f"{KEY}: must be {rule}, got {address!r}")
    _read_again()
    try:
        _knock(canonicalize_bootstrap_address(address))
        ray.init(address=address, log_to_driver=False, configure_logging=True, logging_level=logging.ERROR)
    except grpc.RpcError as error:
        refused = error.code() is grpc.StatusCode.UNAUTHENTICATED
        what = "refused us" if refused else "does not answer as Ray does"
        raise BadInput(f"{KEY}: {address} {what}: {error.details()}{_mode() if refused else ''}") from None
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise BadInput(f"{KEY}: cannot join {address}: {error}{_cause(error)}") from None


def _knock(address: str | None) -> None:
    """One call that tells at once what Ray's own start would find out in a minute, or never."""
    if address is None:
        raise ValueError("no Ray cluster is running on this machine")
    with create_gcs_channel(address) as channel:
        stub: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
        stub.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=PATIENCE)  # type: ignore[attr-defined]


def _mode() -> str:
    if get_authentication_mode() == AuthenticationMode.TOKEN:
        return "; the token came from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
    return "; set RAY_AUTH_MODE=token and the cluster's token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token)"


def _cause(error: BaseException) -> str:
    return f" ({error.__cause__})" if error.__cause__ else ""


def _read_again() -> None:
    """Ray keeps what it once read of the environment."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _environment(changed: Mapping[str, str]) -> Iterator[None]:
    """The environment with these changes, which processes started meanwhile inherit."""
    before = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
