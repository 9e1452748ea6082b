"""An authority, and nodes' keys and certificates, as files: made anew by each test that needs them."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fl.transport.identity import Identity


class Authority:
    """Signs nodes' certificates; its files go to ``folder``."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP384R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
        made = self._sign(self.name, self.key.public_key(), x509.BasicConstraints(ca=True, path_length=0))
        (folder / "ca.crt").write_bytes(made.public_bytes(Encoding.PEM))

    def _sign(self, subject: x509.Name, key, constraints: x509.BasicConstraints, *names: str, days: int = 1):
        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(constraints, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if names:
            made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
        if constraints.ca:
            use = dict.fromkeys(
                ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
                 "crl_sign", "encipher_only", "decipher_only"), False)  # fmt: skip
            made = made.add_extension(x509.KeyUsage(key_cert_sign=True, **use), critical=True)
        return made.sign(self.key, hashes.SHA384())

    def identity(self, name: str, authority: Path | None = None, openssh: bool = True, days: int = 1) -> Identity:
        """The files of the node ``name``, which trusts ``authority`` (this one's certificate by default)."""
        key = ec.generate_private_key(ec.SECP384R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._sign(subject, key.public_key(), x509.BasicConstraints(ca=False, path_length=None), name, days=days)
        form = PrivateFormat.OpenSSH if openssh else PrivateFormat.PKCS8
        files = Identity(authority or self.folder / "ca.crt", self.folder / f"{name}.crt", self.folder / name)
        files.certificate.write_bytes(made.public_bytes(Encoding.PEM))
        files.key.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
        return files
