"""What every test needs: no telemetry, one torch thread, and real data where there is any."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

_SIBLING = Path(__file__).resolve().parents[2] / "shared" / "data"  # ../shared/data beside the repository
if not os.environ.get("FEDSTRATA_REAL_DATA") and _SIBLING.is_dir():
    os.environ["FEDSTRATA_REAL_DATA"] = str(_SIBLING)


MACHINE = {  # files whose tests start Rays, federations or deployments as processes of their own
    "benchmarks": ("grid", "leak", "memory", "rounds", "scale"),
    "deploy": ("processes", "superexec", "trainer"),
    "faults": ("kill",),
    "server": ("client_memory", "cluster", "flwr_run", "ray_faults", "ray_run", "raygrid", "sweep"),
    "strategies": ("actors",),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a file's tests go to one worker, so that what a module starts is started once.

    Those that want the machine follow one another, on one worker: two at a time would wait for each other's processors
    and run out of their patience.
    """
    from xdist.scheduler import LoadFileScheduling

    alone = {f"tests/{folder}/test_{name}.py" for folder, names in MACHINE.items() for name in names}

    class Files(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "machine" if file in alone else file

    return Files(config, log)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Tiny models are slower on several threads. Tests that need no torch do not pay for its import."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    return


@pytest.fixture
def real_data() -> Path:
    """The folder with real instruction data; the test is skipped where there is none."""
    folder = Path(os.environ.get("FEDSTRATA_REAL_DATA", ""))
    if not os.environ.get("FEDSTRATA_REAL_DATA") or not (folder / "multimodal").is_dir():
        pytest.skip("FEDSTRATA_REAL_DATA names no folder with real data")
    return folder


@pytest.fixture(scope="session")
def write_fcit() -> Callable[..., Path]:
    """`benchmarks/fcit_tree.py`'s writer: a miniature of FCIT's data in the published layout."""
    path = Path(__file__).parents[1] / "benchmarks" / "fcit_tree.py"
    spec = importlib.util.spec_from_file_location("fcit_tree", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_tree  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def fcit_root(write_fcit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All twelve datasets, both groupings, three betas; read only."""
    return write_fcit(tmp_path_factory.mktemp("fcit"))
