"""The Flower app that a deployment submits: one pyproject.toml and no code.

What runs is the fedstrata that is installed beside the SuperLink's and the SuperNodes' executors, so the bundle that
Flower carries to the nodes is the same bytes for every run of a version, and a node can refuse every other one.
"""

import hashlib
import tempfile
from importlib.metadata import version
from pathlib import Path

SERVER_APP, CLIENT_APP = "fedstrata.server.app:app", "fedstrata.client.shim:app"
# the run config that may be set, and its defaults, as TOML
CONFIG = {"recipe": '""', "overrides": '""', "resume": "false", "rehearse": "false", "insecure": "false"}
REFUSED = "bad input: "  # how the ServerApp's last words begin when another try would end as this one did


def text() -> str:
    """The app's pyproject.toml."""
    config = "".join(f"{key} = {default}\n" for key, default in CONFIG.items())
    return (
        f'[project]\nname = "fedstrata"\nversion = "{version("fedstrata")}"\nlicense = "Apache-2.0"\n\n'
        '[tool.flwr.app]\npublisher = "fedstrata"\n\n'
        f'[tool.flwr.app.components]\nserverapp = "{SERVER_APP}"\nclientapp = "{CLIENT_APP}"\n\n'
        f"[tool.flwr.app.config]\n{config}"
    )


def write(folder: Path) -> Path:
    """Writes the app into a new or empty folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(text(), encoding="utf-8")
    return folder


def bundle_hash(folder: Path) -> str:
    """SHA-256 of the bundle that Flower makes of the app written in `folder`, as Flower names it."""
    from flwr.cli.build import build_fab_from_disk

    return hashlib.sha256(build_fab_from_disk(folder)).hexdigest()


def own_hash() -> str:
    """`bundle_hash` of this version's app: the only one that its nodes serve."""
    with tempfile.TemporaryDirectory() as folder:
        return bundle_hash(write(Path(folder)))
