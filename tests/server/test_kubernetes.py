"""The manifests in docs/kubernetes: valid by Kubernetes' own schema, and as strict as the Compose file."""

from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "kubernetes"
OBJECTS = [
    tree for path in sorted(FOLDER.glob("*.yaml")) for tree in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]
PODS = [tree for tree in OBJECTS if tree["kind"] in ("Deployment", "Job")]


def name(tree: dict[str, Any]) -> str:
    return f"{tree['kind']}-{tree['metadata']['name']}"


@pytest.mark.parametrize("tree", OBJECTS, ids=name)
def test_kubernetes_takes_every_object(tree: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    validator.validate(tree, "1.32", strict=True)


def test_kubernetes_would_refuse_a_misspelt_key() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    with pytest.raises(validator.ValidationError):
        validator.validate({**PODS[0], "spec": {**PODS[0]["spec"], "replica": 1}}, "1.32", strict=True)


@pytest.mark.parametrize("tree", PODS, ids=name)
def test_every_pod_runs_with_as_little_as_it_needs(tree: dict[str, Any]) -> None:
    pod = tree["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    for part in pod["initContainers"] + pod["containers"]:
        assert part["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert part["resources"]["limits"]["memory"]
        there = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in part["volumeMounts"]} <= there


def test_a_client_may_reach_the_gate_and_only_the_servers_parts_the_superlink() -> None:
    policies = {tree["metadata"]["name"]: tree["spec"] for tree in OBJECTS if tree["kind"] == "NetworkPolicy"}
    assert policies["nobody"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}  # the rest is denied

    def parts(peers: list[dict[str, Any]]) -> list[str]:
        return [each["podSelector"]["matchLabels"]["part"] for each in peers if "podSelector" in each]

    assert parts(policies["superlink"]["ingress"][0]["from"]) == ["gate", "server", "run"]
    assert [parts(rule["to"]) for rule in policies["client"]["egress"]] == [[], ["gate"]]
    assert parts(policies["gate"]["ingress"][0]["from"]) == ["client"]


def test_the_gates_rules_are_those_of_the_compose_file() -> None:
    ours = (FOLDER.parents[1] / ".docker" / "gate.conf").read_text(encoding="utf-8")
    (theirs,) = [tree["data"]["nginx.conf"] for tree in OBJECTS if name(tree) == "ConfigMap-gate"]
    differ = set(map(str.strip, ours.splitlines())) ^ set(map(str.strip, theirs.splitlines()))
    assert {line.split()[0] for line in differ} == {
        "resolver",  # a service's address stays
        "set",
        "proxy_pass",
        "ssl_certificate",  # paths
        "ssl_certificate_key",
        "proxy_ssl_trusted_certificate",
    }
