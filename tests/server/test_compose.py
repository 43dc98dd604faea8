"""The deployment's files, read as text: who reaches whom, who may do what, and that Flower takes the commands."""

import os
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.supercore.cli.flower_superexec import _parse_args as superexec_parser
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink as superlink_parser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def services(*names: str) -> dict[str, dict[str, Any]]:
    tree = yaml.safe_load((ROOT / (names[0] if names else "docker-compose.yml")).read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = tree["services"]
    return found


SERVICES = services()
CLIENTS = [name for name in SERVICES if name.startswith("client-")]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_runs_with_as_little_as_it_needs(name: str) -> None:
    part = SERVICES[name]
    assert part["user"] == "49999:49999"
    assert part["read_only"] is True
    assert part["mem_limit"]
    assert part["pids_limit"]
    assert part["cap_drop"] == ["ALL"]
    assert part["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "ports", "pid", "ipc", "devices"} & set(part)
    assert not [volume for volume in part.get("volumes", []) if volume.startswith(("/", ".", "~"))]  # no host folders


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_shares_its_network_with_the_gate_alone_and_its_volumes_with_no_other_client(name: str) -> None:
    (network,) = SERVICES[name]["networks"]
    assert [other for other, part in SERVICES.items() if network in part.get("networks", [])] == ["gate", name]
    mine = {volume.split(":")[0] for volume in SERVICES[name]["volumes"]}
    for other in set(CLIENTS) - {name}:
        assert not mine & {volume.split(":")[0] for volume in SERVICES[other]["volumes"]}


def test_only_what_belongs_to_the_server_reaches_the_control_api() -> None:
    core = {name for name, part in SERVICES.items() if "core" in part.get("networks", [])}
    assert core == {"superlink", "server", "gate", "run"}
    tree = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    assert all(net == {"internal": True} for name, net in tree["networks"].items() if name != "outside")


def test_the_authoritys_key_is_mounted_where_certificates_are_made_and_nowhere_else() -> None:
    holders = [name for name, part in SERVICES.items() if any("keys-ca:" in each for each in part.get("volumes", []))]
    assert holders == ["certs"]
    assert SERVICES["certs"]["network_mode"] == "none"
    others = [volume for name in SERVICES if name != "certs" for volume in SERVICES[name].get("volumes", [])]
    assert all(volume.endswith(":ro") for volume in others if volume.startswith("keys-"))


def test_track_sends_what_ended_runs_wrote_and_nothing_of_one_that_is_going_on(tmp_path: Path) -> None:
    """The service's own script; `sleep` ends it after one turn, `wandb` and `timeout` write down what they are told."""
    (tmp_path / "bin").mkdir()
    for name, does in {
        "sleep": f"mv {tmp_path}/more {tmp_path}/less",
        "timeout": f'echo "$@" >> {tmp_path}/said',
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "more").touch()
    for run, age in {"ended": 120, "just now": 0}.items():
        (tmp_path / "runs" / run / "wandb" / "offline-run-1").mkdir(parents=True)
        (tmp_path / "runs" / run / "summary.json").touch()
        os.utime(tmp_path / "runs" / run / "summary.json", (time.time() - age,) * 2)
    (tmp_path / "runs" / "going on" / "wandb" / "offline-run-1").mkdir(parents=True)
    shell, flag, script = SERVICES["track"]["entrypoint"]
    script = script.replace("$$", "$").replace("/runs", str(tmp_path / "runs"))
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([shell, flag, script], env={"PATH": path}, check=True, stderr=subprocess.DEVNULL)
    (said,) = (tmp_path / "said").read_text().splitlines()
    limit, *command = said.split()
    assert limit == "600"
    assert command == ["wandb", "sync", str(tmp_path / "runs" / "ended" / "wandb" / "offline-run-1")]


def test_flower_takes_the_commands() -> None:
    command, *words = SERVICES["superlink"]["entrypoint"]
    told = superlink_parser().parse_args(words)
    assert (command, told.isolation, told.enable_supernode_auth, told.insecure) == (
        "flower-superlink",
        "process",
        True,
        False,
    )
    assert told.database
    assert told.ssl_certfile
    command, *words = SERVICES["server"]["entrypoint"]
    executor = superexec_parser().parse_args(words)
    assert (command, executor.insecure, executor.runtime_api_address) == ("flower-superexec", False, "superlink:8000")
    assert executor.superexec_auth_secret_file == told.superexec_auth_secret_file


def test_the_gate_forwards_the_fleet_api_and_limits_bodies() -> None:
    text = (ROOT / ".docker" / "gate.conf").read_text(encoding="utf-8")
    assert text.count("proxy_pass ") == 1
    assert "location /v1/fleet/ {\n      proxy_pass" in text
    assert "location / { return 403" in text
    assert "client_max_body_size 96m;" in text
    assert "proxy_ssl_verify on;" in text
    assert "listen 8443 ssl;" in text
    assert text.count("listen ") == 1


def test_the_image_pins_versions_that_pyproject_asks_for() -> None:
    lines = (ROOT / ".docker" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    for each in map(Requirement, wanted):
        assert each.specifier.contains(pins[canonicalize_name(each.name)]), each


def test_the_image_runs_as_nobody_in_particular_and_installs_nothing_later() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    final = text[text.index("FROM ${BASE} AS app") :]
    assert "USER 49999:49999" in final
    assert "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1" in final
    assert "FLWR_TELEMETRY_ENABLED=0" in final
    assert "pip install" not in final
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert kept[1] == "*"  # nothing gets in that is not named: no keys, no data, no runs


def test_an_override_names_services_that_there_are() -> None:
    assert set(services("docker-compose.gpu.yml")) <= set(SERVICES)
    assert set(services("docker-compose.demo.yml")) - set(SERVICES) == {"data"}
