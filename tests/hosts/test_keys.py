import datetime
import ipaddress
import os
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fl.cli import main
from fl.errors import ConfigError, ShoalError
from fl.hosts.keys import add_node, make_keys, node_names


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "keys"
    before = os.umask(0)  # the modes must not come from the umask
    try:
        make_keys(folder, ["10.77.0.1", "Server.example.org"], ["node-0", "alice"], days=90)
    finally:
        os.umask(before)
    return folder


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def names(path: Path) -> x509.SubjectAlternativeName:
    return certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def policy(keys: Path) -> PolicyBuilder:
    return PolicyBuilder().store(Store([certificate(keys / "ca.crt")])).max_chain_depth(0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_and_their_modes(keys):
    modes = {path.name: path.stat().st_mode & 0o777 for path in keys.iterdir()}
    private = {"ca.key": 0o600, "server.key": 0o600, "node-0": 0o600, "alice": 0o600}
    public = ["ca.crt", "server.pem", "node-0.pub", "node-0.crt", "alice.pub", "alice.crt"]
    assert modes == {**private, **dict.fromkeys(public, 0o644)}
    assert keys.stat().st_mode & 0o777 == 0o700


def test_the_servers_certificate_holds_for_its_names_and_for_loopback(keys):
    found = names(keys / "server.pem")
    assert found.get_values_for_type(x509.DNSName) == ["server.example.org", "localhost"]
    addresses = [ipaddress.ip_address(text) for text in ("10.77.0.1", "127.0.0.1", "::1")]
    assert found.get_values_for_type(x509.IPAddress) == addresses


def test_the_chain_verifies(keys):
    server = certificate(keys / "server.pem")
    for name in (x509.DNSName("server.example.org"), x509.IPAddress(ipaddress.ip_address("10.77.0.1"))):
        assert len(policy(keys).build_server_verifier(name).verify(server, [])) == 2
    for name in ("node-0", "alice"):
        node = certificate(keys / f"{name}.crt")
        assert len(policy(keys).build_client_verifier().verify(node, []).chain) == 2
        policy(keys).build_server_verifier(x509.DNSName(name)).verify(node, [])


def test_a_node_cannot_pass_for_the_server_nor_another_authority(keys, tmp_path):
    node = certificate(keys / "node-0.crt")
    for name in (x509.DNSName("server.example.org"), x509.DNSName("alice"), x509.DNSName("localhost")):
        with pytest.raises(VerificationError):
            policy(keys).build_server_verifier(name).verify(node, [])
    make_keys(tmp_path / "other", ["10.77.0.1"], ["node-0"])
    with pytest.raises(VerificationError):
        policy(keys).build_client_verifier().verify(certificate(tmp_path / "other" / "node-0.crt"), [])
    with pytest.raises(VerificationError):  # a server is no client
        policy(keys).build_client_verifier().verify(certificate(keys / "server.pem"), [])


def test_only_the_authority_may_sign(keys):
    for name in ("server.pem", "node-0.crt"):
        extensions = certificate(keys / name).extensions
        assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert not extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    basic = certificate(keys / "ca.crt").extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical and basic.value.ca and basic.value.path_length == 0


def test_openssl_and_python_load_the_servers_pair(keys):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server.pem", keys / "server.key")


def test_a_nodes_key_loads_in_flowers_own_loaders(keys, monkeypatch):
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    class Arguments:
        auth_supernode_private_key = str(keys / "alice")
        auth_supernode_public_key = None

    loaded = _try_setup_client_authentication(Arguments)
    assert loaded is not None and isinstance(loaded[0].curve, ec.SECP384R1)
    assert try_load_public_key(keys / "alice.pub").startswith(b"-----BEGIN PUBLIC KEY")


def test_key_public_key_and_certificate_of_a_node_are_one(keys):
    private = load_ssh_private_key((keys / "alice").read_bytes(), None)
    signed = certificate(keys / "alice.crt")
    assert private.public_key() == load_ssh_public_key((keys / "alice.pub").read_bytes()) == signed.public_key()
    assert signed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "alice"
    assert names(keys / "alice.crt").get_values_for_type(x509.DNSName) == ["alice"]
    usage = signed.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    others = [load_ssh_public_key((keys / name).read_bytes()) for name in ("alice.pub", "node-0.pub")]
    assert others[0] != others[1]


def test_validity(keys):
    now = datetime.datetime.now(datetime.UTC)
    for name in ("ca.crt", "server.pem", "alice.crt"):
        found = certificate(keys / name)
        assert datetime.timedelta(minutes=5) < now - found.not_valid_before_utc < datetime.timedelta(minutes=30)
        assert abs(found.not_valid_after_utc - now - datetime.timedelta(days=90)) < datetime.timedelta(hours=1)


def test_nothing_is_overwritten(tmp_path):
    folder = tmp_path / "keys"
    make_keys(folder, ["server"], ["node-0"])
    before = contents(folder)
    with pytest.raises(ConfigError, match="nothing is overwritten.*--add-node"):
        make_keys(folder, ["server"], ["node-1"])
    with pytest.raises(ConfigError, match=r"node-0, node-0\.pub, node-0\.crt"):
        add_node(folder, "node-0")
    (folder / "bob.crt").write_text("mine")
    (folder / "carol.pub").symlink_to(tmp_path / "elsewhere")
    for name in ("bob", "carol"):
        with pytest.raises(ConfigError, match=rf"has {name}\."):
            add_node(folder, name)
    (folder / "carol.pub").unlink()
    assert contents(folder) == {**before, "bob.crt": b"mine"}


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    folder = tmp_path / "keys"
    make_keys(folder, ["server"], ["node-0"])
    (folder / "carol.crt").write_text("mine")
    monkeypatch.setattr(os.path, "lexists", lambda path: False)  # it was not there a moment ago
    with pytest.raises(FileExistsError):
        add_node(folder, "carol")
    assert (folder / "carol.crt").read_text() == "mine"


def test_an_empty_folder_is_taken_and_closed(tmp_path):
    tmp_path.chmod(0o755)
    make_keys(tmp_path, ["server"], ["node-0"])
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_add_node(tmp_path):
    folder = tmp_path / "keys"
    make_keys(folder, ["server"], ["node-0"], days=30)
    before = contents(folder)
    add_node(folder, "carol", days=365)
    after = contents(folder)
    assert set(after) - set(before) == {"carol", "carol.pub", "carol.crt"}
    assert {name: after[name] for name in before} == before
    policy(folder).build_client_verifier().verify(certificate(folder / "carol.crt"), [])
    # It is not valid for longer than the authority that signed it.
    assert certificate(folder / "carol.crt").not_valid_after_utc == certificate(folder / "ca.crt").not_valid_after_utc
    assert (folder / "carol").stat().st_mode & 0o777 == 0o600


def test_no_node_has_a_name_of_the_server(tmp_path):
    with pytest.raises(ConfigError, match="must not pass for it"):
        make_keys(tmp_path / "keys", ["10.0.0.1", "alice"], ["alice"])
    make_keys(tmp_path / "keys", ["10.0.0.1", "alice"], ["node-0"])
    with pytest.raises(ConfigError, match="must not pass for it"):
        add_node(tmp_path / "keys", "alice")


def test_add_node_needs_the_authority(tmp_path):
    folder = tmp_path / "keys"
    make_keys(folder, ["server"], ["node-0"])
    (folder / "ca.key").chmod(0o640)
    with pytest.raises(ShoalError, match=r"mode 640.*chmod 600"):
        add_node(folder, "carol")
    other = tmp_path / "other"
    make_keys(other, ["server"], ["node-0"])
    (folder / "ca.key").write_bytes((other / "ca.key").read_bytes())
    (folder / "ca.key").chmod(0o600)
    with pytest.raises(ShoalError, match=r"is not the key of"):
        add_node(folder, "carol")
    (folder / "ca.key").unlink()
    with pytest.raises(ShoalError, match=r"there is no file .*ca\.key"):
        add_node(folder, "carol")
    assert not (folder / "carol").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", "Alice", "ca", "server", "-a", "a b", "x" * 64, "node-0.pub"])
def test_names_that_no_node_may_have(tmp_path, name):
    with pytest.raises(ConfigError, match="--nodes"):
        make_keys(tmp_path / "keys", ["server.example.org"], [name])
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("name", ["", "a:8000", "https://a", "a b", "10.0.0.300", "-a", "a,b", "*.example.org"])
def test_names_that_no_server_has(tmp_path, name):
    with pytest.raises(ConfigError, match="--server"):
        make_keys(tmp_path / "keys", [name], ["node-0"])


def test_node_names():
    assert node_names("2") == ["node-0", "node-1"]
    assert node_names("alice, bob") == ["alice", "bob"]
    for spec in ("0", "10001"):
        with pytest.raises(ConfigError):
            node_names(spec)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2"], "both are needed"),
        (["--server", "a"], "both are needed"),
        (["--server", "a", "--nodes", "x,x"], "a name of its own"),
        (["--server", "a", "--nodes", "1", "--days", "0"], "1 to 36500 days"),
        (["--server", "a", "--nodes", "1", "--add-node", "b"], "without --server"),
    ],
)
def test_wrong_options(tmp_path, capfd, words, message):
    assert main(["keys", str(tmp_path / "keys"), *words]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "keys").exists()


def test_the_command_says_which_file_goes_where(tmp_path, capfd):
    assert main(["keys", str(tmp_path / "keys"), "--server", "10.0.0.1", "--nodes", "alice"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["to", "the", "server", "server.key", "server.pem", "ca.crt", "alice.pub"],
        ["to", "alice", "ca.crt", "alice", "alice.pub", "alice.crt"],
    ]
    assert "ca.key" in lines[3] and "offline" in lines[3]
    assert main(["keys", str(tmp_path / "keys"), "--add-node", "bob"]) == 0
    assert "bob.pub; then start `shoal server` again" in capfd.readouterr().out


def test_openssl_agrees(keys):
    """A second implementation of the rules of RFC 5280."""
    try:
        check = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", "server.pem", "node-0.crt", "alice.crt"]
        done = subprocess.run(check, cwd=keys, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no openssl here")
    assert done.stdout.splitlines() == ["server.pem: OK", "node-0.crt: OK", "alice.crt: OK"], done.stderr
