"""One rule: the folder x/ is imported as fedstrata.x; what is in the tree is what gets installed."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("benchmarks", "client", "core", "scenarios", "server", "strategies")
NOT_OURS = {"tests", "docs", "build", "dist", "runs"}
DATA = {"client": "tiny/*", "scenarios": "library/*.yaml", "server": "report.html.j2"}
COMES_WITH = {"ray": "flwr", "grpc": "flwr", "click": "typer", "tokenizers": "transformers", "markupsafe": "jinja2"}


def wanted() -> set[str]:
    """Every file of the five folders that a wheel must hold, under its installed name."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
    files += [ROOT / folder / "py.typed" for folder in FOLDERS]
    files += [path for folder, pattern in DATA.items() for path in (ROOT / folder).glob(pattern) if path.is_file()]
    return {f"fedstrata/{path.relative_to(ROOT).as_posix()}" for path in files}


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What a command prints, run in `folder`; the test fails with its output when it fails."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP"}
    inherited = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        command, cwd=folder, env={**inherited, **environment}, text=True, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, the wheel made from it, and `straight/` with a wheel made from the tree."""
    pytest.importorskip("setuptools", reason="building without a network needs setuptools, a dev dependency")
    pytest.importorskip("build")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run([*build, "--outdir", str(out), "."], tree)
    run([*build, "--wheel", "--outdir", str(out / "straight"), "."], tree)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel; its dependencies are this environment's."""
    target = tmp_path_factory.mktemp("installed")
    wheel = next(built.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    run([*pip, "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel)], target)
    return target


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_folder_with_python_files_is_a_mapped_package() -> None:
    folders = {path.parent.name for path in ROOT.glob("[!.]*/*.py")} - NOT_OURS
    mapping = {f"fedstrata.{folder}": folder for folder in folders}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == mapping
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(mapping)
    assert folders == set(FOLDERS)


def test_no_folder_nests_a_package() -> None:
    nested = [path for folder in FOLDERS for path in (ROOT / folder).glob("*/**/*.py")]
    assert nested == []  # an editable install would find them, a wheel would not hold them


def test_no_folder_of_the_root_shadows_the_installed_package() -> None:
    assert not (ROOT / "fedstrata").exists()


def test_flowers_components_name_modules_that_exist() -> None:
    components = PROJECT["tool"]["flwr"]["app"]["components"]
    for reference in components.values():
        module, _, attribute = reference.partition(":")
        path = ROOT / f"{module.removeprefix('fedstrata.').replace('.', '/')}.py"
        assert re.search(rf"^{attribute} = ", path.read_text(encoding="utf-8"), re.MULTILINE), reference


def test_every_imported_library_is_a_declared_dependency() -> None:
    imported = {name for folder in FOLDERS for path in (ROOT / folder).glob("*.py") for name in imports(path)}
    third = {COMES_WITH.get(name, name) for name in imported - set(sys.stdlib_module_names) - {"fedstrata"}}
    owners = importlib.metadata.packages_distributions()
    used = {owner.casefold() for name in third for owner in owners[name][:1]}
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])]
    declared = {re.split(r"[\[<>=~! ]", line)[0].casefold() for line in lines}
    assert used - declared == set()


def imports(path: Path) -> set[str]:
    """The top-level names that a module imports."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.partition(".")[0] for name in plain} | {
        node.module.partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module
    }


def test_the_wheel_holds_every_module_and_all_package_data(built: Path) -> None:
    held = names(next(built.glob("*.whl")))
    assert wanted() - held == set()


def test_the_wheel_claims_no_name_but_fedstrata(built: Path) -> None:
    held = names(next(built.glob("*.whl")))
    tops = {name.partition("/")[0] for name in held}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fedstrata"}
    assert "fedstrata/__init__.py" not in held  # a namespace: it must not hide an editable install's folders
    assert not [name for name in held if "tests" in name or "__pycache__" in name]


def test_the_sdist_holds_what_the_wheel_needs(built: Path) -> None:
    assert names(next(built.glob("*.whl"))) == names(next((built / "straight").glob("*.whl")))
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        tops = {name.partition("/")[0] for name in archive.getnames()}
    assert len(tops) == 1


def test_an_installed_wheel_runs_from_its_own_files(installed: Path, tmp_path: Path) -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"]
    modules = [f"fedstrata.{path.parent.name}.{path.stem}" for path in paths]
    code = (
        "import importlib.util\n"
        "import fedstrata.client.app, fedstrata.server.launch\n"
        f"print(*[importlib.util.find_spec(name).origin for name in {modules!r}], sep='\\n')\n"
        "from fedstrata.client.model import TINY\n"
        "from fedstrata.scenarios import LIBRARY\n"
        "print(TINY / 'config.json', LIBRARY / 'fcit-mini.yaml', sep='\\n')\n"
    )
    files = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert len(files) == len(modules) + 2
    assert [name for name in files if not Path(name).is_relative_to(installed)] == []
    assert all(Path(name).is_file() for name in files)


def test_the_console_script_answers_from_another_directory(installed: Path, tmp_path: Path) -> None:
    said = run([str(installed / "bin" / "fedstrata"), "list"], tmp_path, PYTHONPATH=str(installed), COLUMNS="200")
    assert "disco" in said
    assert "fcit-mini-het" in said
    assert list(tmp_path.iterdir()) == []
