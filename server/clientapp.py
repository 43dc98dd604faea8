"""The process that serves one message on a client's host: it lets no app in but this version's own.

`python -m fedstrata.server.clientapp`, started by `server/superexec.py` with the arguments of `flwr-clientapp`.
"""

import hashlib
import os
from importlib.metadata import version

from fedstrata.core import flowerapp
from fedstrata.core.config import require
from fedstrata.server.flower_private import serve_task

OWN = "FEDSTRATA_BUNDLE"  # SHA-256 of the only bundle that this node serves, from the process that starts this one


def check(bundle: bytes) -> None:
    """Raises `BadInput` for every bundle but the one that `fedstrata deploy run` of this version submits."""
    found, rule = hashlib.sha256(bundle).hexdigest(), f"the bundle of fedstrata {version('fedstrata')}"
    require(found == os.environ[OWN], "app", f"{rule} (SHA-256 {os.environ[OWN][:16]}…)", f"{found[:16]}…")


if __name__ == "__main__":
    serve_task(check, flowerapp.CLIENT_APP)
