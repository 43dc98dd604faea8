"""The keys of a deployment: OpenSSL believes them, Flower reads them, nothing is overwritten by mistake."""

import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve
from typer.testing import CliRunner

from fedstrata.core.errors import BadInput
from fedstrata.server import deploycheck, deploying, deploykeys
from fedstrata.server.deployflower import Place, place_of


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    deploykeys.make(tmp_path, 2, ["fed.example.org", "10.0.0.7"])
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_openssl_verifies_both_certificates_for_every_name(keys: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    names = {"server": ["superlink", "localhost", "fed.example.org"], "gate": ["gate", "fed.example.org"]}
    for party, hosts in names.items():
        for host in hosts:
            words = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", host]
            files = ["-CAfile", str(keys / party / "ca.crt"), str(keys / party / f"{party}.crt")]
            assert subprocess.run([*words, *files], capture_output=True, check=False).returncode == 0, (party, host)


def test_an_address_is_certified_as_an_address(keys: Path) -> None:
    certificate = x509.load_pem_x509_certificate((keys / "gate" / "gate.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {str(each) for each in names.get_values_for_type(x509.IPAddress)} == {"127.0.0.1", "10.0.0.7"}


def test_every_secret_is_for_its_owner_alone(keys: Path) -> None:
    secrets = [path for path in keys.rglob("*") if path.suffix in (".key", ".secret")]
    assert len(secrets) == 6  # ca, server, gate, two nodes, the SuperExec's
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}


def test_a_node_key_is_one_that_flower_takes_and_the_server_holds_its_public_half(keys: Path) -> None:
    private = serialization.load_ssh_private_key((keys / "client-1" / "node.key").read_bytes(), None)
    public = serialization.load_ssh_public_key((keys / "server" / "nodes" / "client-1.pub").read_bytes())
    assert uses_nist_ec_curve(public)
    assert private.public_key() == public


def test_nothing_that_is_there_is_made_again(keys: Path) -> None:
    before = content(keys)
    assert deploykeys.make(keys, 2) == []
    assert content(keys) == before
    assert deploykeys.make(keys, 3) == ["client-2"]
    assert {name: data for name, data in content(keys).items() if "client-2" not in name} == before


def test_rotation_replaces_one_key_and_no_other(keys: Path) -> None:
    before = content(keys)
    assert deploykeys.make(keys, 2, rotate="client-0") == ["client-0"]
    after = content(keys)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"client-0/node.key", "client-0/node.pub", "server/nodes/client-0.pub"}


def test_a_key_that_was_carried_to_its_client_is_there_and_is_not_made_again(keys: Path) -> None:
    public = (keys / "server" / "nodes" / "client-0.pub").read_bytes()
    shutil.rmtree(keys / "client-0")
    assert deploykeys.make(keys, 3) == ["client-2"]
    assert (keys / "server" / "nodes" / "client-0.pub").read_bytes() == public
    assert not (keys / "client-0").exists()
    assert deploykeys.make(keys, 3, rotate="client-0") == ["client-0"]
    assert (keys / "server" / "nodes" / "client-0.pub").read_bytes() != public


def test_a_certificate_made_anew_keeps_its_names_unless_others_are_given(keys: Path) -> None:
    old = (keys / "gate" / "gate.crt").read_bytes()
    assert deploykeys.make(keys, 2, rotate="gate") == ["gate"]
    assert (keys / "gate" / "gate.crt").read_bytes() != old
    assert names(keys, "gate") == ["gate", "localhost", "127.0.0.1", "fed.example.org", "10.0.0.7"]
    deploykeys.make(keys, 2, ["new.example.org"], rotate="server")
    assert names(keys, "server") == ["server", "superlink", "localhost", "127.0.0.1", "new.example.org"]


def test_a_host_that_a_certificate_does_not_name_is_told_and_the_hinted_command_makes_it_anew(keys: Path) -> None:
    for party in ("server", "gate"):
        before = content(keys)
        with pytest.raises(BadInput, match=f"--host: .*{party}.crt stands and does not name new.example.org;") as told:
            deploykeys.make(keys, 3, ["new.example.org", "fed.example.org"])
        assert content(keys) == before
        deploy(str(told.value).rpartition("to make it anew: ")[2])
        assert {"localhost", "fed.example.org", "10.0.0.7", "new.example.org"} <= set(names(keys, party))
    assert deploykeys.make(keys, 3, ["new.example.org"]) == []


def deploy(command: str) -> None:
    """Runs a command that a message named."""
    assert command.startswith("fedstrata deploy ")
    done = CliRunner().invoke(deploying.deploy, shlex.split(command)[2:])
    assert done.exit_code == 0, done.output


def test_a_new_authority_brings_new_certificates_and_keeps_the_node_keys(keys: Path) -> None:
    before = content(keys)
    assert deploykeys.make(keys, 2, rotate="ca") == ["ca", "server", "gate"]
    after = content(keys)
    kept = {name for name in before if before[name] == after[name]}
    assert kept == {
        "server/superexec.secret",
        *(f"client-{k}/{file}" for k in (0, 1) for file in ("node.key", "node.pub")),
        *(f"server/nodes/client-{k}.pub" for k in (0, 1)),
    }
    assert len({data for name, data in after.items() if name.endswith("/ca.crt")}) == 1
    authority = x509.load_pem_x509_certificate(after["client-1/ca.crt"])
    x509.load_pem_x509_certificate(after["gate/gate.crt"]).verify_directly_issued_by(authority)
    assert names(keys, "gate")[-2:] == ["fed.example.org", "10.0.0.7"]


@pytest.mark.parametrize("party", ["ca", "server"])
def test_the_hint_for_a_certificate_that_ends_or_is_anothers_makes_it_anew(keys: Path, party: str) -> None:
    path = keys / "server" / f"{party}.crt"
    place = Place("127.0.0.1:9", keys / "server", keys)
    deploykeys.make(keys / "other", 1)
    shutil.copy(keys / "other" / "server" / "server.crt", keys / "server" / "server.crt")
    (found,) = [found for found in deploycheck.findings(place, {}) if found.what == "server.crt"]
    assert "is not by the authority in ca.crt; where that is kept: `fedstrata deploy keys" in found.why
    old = path.read_bytes()
    deploy(deploykeys.how(party, to=keys))
    assert path.read_bytes() != old
    (found,) = [found for found in deploycheck.findings(place, {}) if found.what == f"{party}.crt"]
    assert found.good


def test_the_hint_for_a_missing_ca_crt_brings_it_back(keys: Path) -> None:
    authority = (keys / "server" / "ca.crt").read_bytes()
    (keys / "server" / "ca.crt").unlink()
    told = {"FEDSTRATA_SUPERLINK": "a:1", "FEDSTRATA_HOME": "/x", "FEDSTRATA_CERTS": str(keys / "server")}
    with pytest.raises(BadInput, match="holds no ca.crt; where the authority is kept.*`fedstrata deploy keys") as hint:
        place_of(told, insecure=False)
    deploy(str(hint.value).split("`")[1].replace("KEYS", str(keys)))
    assert (keys / "server" / "ca.crt").read_bytes() == authority


def names(keys: Path, party: str) -> list[str]:
    certificate = x509.load_pem_x509_certificate((keys / party / f"{party}.crt").read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]


def test_a_lost_authority_is_not_replaced_in_silence(keys: Path) -> None:
    shutil.rmtree(keys / "ca")
    before = content(keys)
    with pytest.raises(BadInput, match=r"ca: ca.key and ca.crt missing, but certificates stand"):
        deploykeys.make(keys, 2)
    assert content(keys) == before


@pytest.mark.parametrize(("clients", "rotate", "rule"), [(0, "", "--clients"), (1, "client-1", "--rotate")])
def test_wrong_words_are_told_before_anything_is_written(tmp_path: Path, clients: int, rotate: str, rule: str) -> None:
    with pytest.raises(BadInput, match=rule):
        deploykeys.make(tmp_path, clients, rotate=rotate)
    assert not any(tmp_path.iterdir())
