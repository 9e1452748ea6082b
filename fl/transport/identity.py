"""Who a node is to the others: its certificate, signed by the operator's authority, and the key that goes with it.

Both ends of a connection present a certificate (TLS 1.3). A node's name is the certificate's: its DNS names if it has
any (subjectAltName), else its common name, compared letter by letter.
"""

from __future__ import annotations

import secrets
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509 import DNSName, ExtensionNotFound, SubjectAlternativeName, load_pem_x509_certificate
from cryptography.x509.oid import NameOID

from fl.errors import ShoalError


@dataclass(frozen=True)
class Identity:
    """The files of one node: the authority's certificate, the node's own, and its private key (OpenSSH or PEM)."""

    authority: Path
    certificate: Path
    key: Path

    def contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """For connections that come in, and for those that go out. Raises `ShoalError` for files that don't fit."""
        made = []
        for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
            context = ssl.SSLContext(protocol)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False  # a node's name is no host's; whoever connects checks it (`names`)
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self.authority)
                self._load(context)
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                raise ShoalError(
                    f"{self.authority}, {self.certificate} and {self.key} are no identity of a node: {error}. "
                    "`shoal keys` makes them."
                ) from error
            made.append(context)
        return made[0], made[1]

    def _load(self, context: ssl.SSLContext) -> None:
        """OpenSSL reads keys from files, and not OpenSSH's: it is given one under a password that is used once."""
        data = self.key.read_bytes()
        load = load_ssh_private_key if b"OPENSSH" in data[:40] else load_pem_private_key
        password = secrets.token_bytes(32).hex().encode()
        pem = load(data, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
        with tempfile.NamedTemporaryFile() as file:
            file.write(pem)
            file.flush()
            context.load_cert_chain(self.certificate, file.name, password)


def name_of(certificate: Path) -> str:
    """The name of the node whose ``certificate`` that is (PEM). Raises `ShoalError` for one without."""
    subject = load_pem_x509_certificate(certificate.read_bytes())
    try:
        found = subject.extensions.get_extension_for_class(SubjectAlternativeName).value.get_values_for_type(DNSName)
    except ExtensionNotFound:
        found = []
    found += [str(a.value) for a in subject.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if not found:
        raise ShoalError(f"{certificate} names nobody. `shoal keys` makes certificates of nodes.")
    return found[0]


def names(sock: ssl.SSLSocket) -> frozenset[str]:
    """The names of the node at the other end of ``sock``."""
    found: dict[str, Any] = dict(sock.getpeercert() or {})
    alternatives = {str(value) for kind, value in found.get("subjectAltName", ()) if kind == "DNS"}
    common = {str(value) for pairs in found.get("subject", ()) for kind, value in pairs if kind == "commonName"}
    return frozenset(alternatives or common)
