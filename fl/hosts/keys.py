"""The keys of a group of hosts: a certificate authority, the server's certificate, and a key pair for each node.

    ca.key ca.crt            the authority that signs the certificates below
    server.key server.pem    the server's key and TLS certificate, for the names and addresses that it has
    NODE NODE.pub NODE.crt   a node's key pair in OpenSSH's form, by which a SuperLink knows the node, and a certificate
                             of the same key, by which nodes know one another (direct sockets)

All keys are on the curve P-384 and have no passphrase. Private keys have mode 0600, the folder has 0700. A node's
certificate holds for its name only, and no node may have a name of the server, so no node can pass for the server.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fl.errors import ConfigError, ShoalError
from fl.hosts import certificates
from fl.hosts.files import CA, CA_KEY, SERVER, SERVER_KEY, check_private, node_files

_RESERVED = ("ca", "server", "localhost")
_NODE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


def make_keys(folder: Path, server: Sequence[str], nodes: Sequence[str], days: int = 365) -> None:
    """Make the whole set in ``folder``, which must not exist or be empty.

    ``server`` are host names and IP addresses under which nodes reach the server; the loopback names are added, since
    the SuperLink's own processes reach it there. Everything is valid for ``days`` days from now.
    """
    names = list(dict.fromkeys([*(_host_name(name) for name in server), *_LOOPBACK]))
    _check_nodes("--nodes", nodes, names)
    _check_days(days)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        way_out = "Name a new folder, or add one node to the keys there with --add-node NAME."
        raise ConfigError("DIR", str(folder), "there are files already, and nothing is overwritten", way_out)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    authority = certificates.new_key()
    issuer = certificates.new_authority(authority, days)
    _write(folder / CA_KEY, _pem(authority), private=True)
    _write(folder / CA, issuer.public_bytes(Encoding.PEM))
    key = certificates.new_key()
    signed = certificates.sign(key.public_key(), names, certificates.SERVER, days, authority, issuer)
    _write(folder / SERVER_KEY, _pem(key), private=True)
    _write(folder / SERVER, signed.public_bytes(Encoding.PEM))
    for name in nodes:
        _make_node(folder, name, days, authority, issuer)


def add_node(folder: Path, name: str, days: int = 365) -> None:
    """Add the three files of one more node to the keys in ``folder``, whose authority signs them."""
    authority, issuer = _load_authority(folder)
    _check_nodes("--add-node", [name], certificates.names_of(folder / SERVER))
    _check_days(days)
    taken = [path.name for path in node_files(folder, name) if os.path.lexists(path)]
    if taken:
        way_out = "Choose another name; a key that is replaced would shut out the node that has it."
        raise ConfigError("--add-node", name, f"{folder} has {', '.join(taken)}, and nothing is overwritten", way_out)
    _make_node(folder, name, days, authority, issuer)


def node_names(spec: str) -> list[str]:
    """``3`` are node-0, node-1 and node-2; anything else is a list of names with commas."""
    if spec.isdecimal():
        if not 1 <= int(spec) <= 10_000:
            raise ConfigError("--nodes", spec, "1 to 10000, or names with commas")
        return [f"node-{number}" for number in range(int(spec))]
    return [name.strip() for name in spec.split(",")]


def make(options: argparse.Namespace) -> int:
    """`shoal keys`: make them, and say which file goes where."""
    folder: Path = options.folder
    if options.add_node is not None:
        if options.server is not None or options.nodes is not None:
            raise ConfigError("--add-node", options.add_node, "it goes without --server and --nodes")
        nodes = [options.add_node]
        add_node(folder, options.add_node, options.days)
    else:
        if options.server is None or options.nodes is None:
            way_out = "Or add one node with --add-node NAME."
            raise ConfigError("--server and --nodes", (options.server, options.nodes), "both are needed", way_out)
        nodes = node_names(options.nodes)
        make_keys(folder, options.server.split(","), nodes, options.days)
    print(f"In {folder}, to be copied over a channel that you trust, such as scp -p:")
    if options.add_node is None:
        print(f"  to the server         {SERVER_KEY} {SERVER} {CA} {' '.join(f'{name}.pub' for name in nodes)}")
    else:
        print(f"  to the server         {options.add_node}.pub; then start `shoal server` again")
    for name in nodes:
        print(f"  to {name:18} {CA} {' '.join(path.name for path in node_files(Path(), name))}")
    print(f"  nowhere               {CA_KEY}: whoever has it can make further servers and nodes. Keep it offline.")
    return 0


def _host_name(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        lower = name.lower()
        if _HOST.fullmatch(lower) and not lower.rsplit(".", 1)[-1].isdecimal():
            return lower
    raise ConfigError("--server", name, "a host name or an IP address, without a port")


def _check_nodes(option: str, nodes: Sequence[str], server: Iterable[str]) -> None:
    for name in nodes:
        if not _NODE.fullmatch(name) or name in _RESERVED:
            allowed = f"a node's name has 1 to 63 of a-z, 0-9 and -, and is none of {', '.join(_RESERVED)}"
            raise ConfigError(option, name, allowed)
        if name in server:
            raise ConfigError(option, name, "the server has this name, and a node must not pass for it")
    if len(set(nodes)) != len(nodes):
        raise ConfigError(option, ",".join(nodes), "every node has a name of its own")


def _check_days(days: int) -> None:
    if not 1 <= days <= 36_500:
        raise ConfigError("--days", days, "1 to 36500 days")


def _load_authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    check_private(folder / CA_KEY)
    try:
        key = load_pem_private_key((folder / CA_KEY).read_bytes(), None)
        issuer = x509.load_pem_x509_certificate((folder / CA).read_bytes())
        issuer.verify_directly_issued_by(issuer)
    except (OSError, ValueError, TypeError, InvalidSignature) as error:
        raise ShoalError(f"{folder} has no authority made by `shoal keys` ({error}).") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != issuer.public_key():
        raise ShoalError(f"{folder / CA_KEY} is not the key of {folder / CA}.")
    end = issuer.not_valid_after_utc
    if end <= datetime.datetime.now(datetime.UTC):
        raise ShoalError(f"the authority {folder / CA} ended on {end:%Y-%m-%d}. Make new keys in a new folder.")
    return key, issuer


def _make_node(
    folder: Path, name: str, days: int, authority: ec.EllipticCurvePrivateKey, issuer: x509.Certificate
) -> None:
    key = certificates.new_key()
    signed = certificates.sign(key.public_key(), [name], certificates.PEER, days, authority, issuer)
    private, public, certificate = node_files(folder, name)
    _write(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), private=True)
    _write(public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {name}\n".encode())
    _write(certificate, signed.public_bytes(Encoding.PEM))


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, private: bool = False) -> None:
    """Write a new file, with its mode from the first byte on; an existing one is never replaced."""
    mode = 0o600 if private else 0o644
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # whatever the umask is
        file.write(content)
