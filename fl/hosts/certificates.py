"""X.509 certificates (RFC 5280) on the curve P-384: an authority of one's own, and what it signs."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fl.errors import ShoalError

SERVER = (ExtendedKeyUsageOID.SERVER_AUTH,)
PEER = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)  # either end of a direct socket
EARLY = datetime.timedelta(minutes=10)  # a host whose clock is behind by less than this accepts a new certificate
_USES = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
_USES += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def new_authority(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    """The certificate, signed by itself, of an authority that may sign hosts but no further authorities."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Shoal certificate authority")])
    return (
        _builder(name, name, key.public_key(), key.public_key(), _until(days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
        .sign(key, hashes.SHA384())
    )


def sign(
    key: ec.EllipticCurvePublicKey,
    names: Sequence[str],
    usages: Sequence[x509.ObjectIdentifier],
    days: int,
    authority: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate,
) -> x509.Certificate:
    """A certificate of ``key`` for ``names``, the first of which is its common name; it ends with ``issuer``'s."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    end = min(_until(days), issuer.not_valid_after_utc)
    return (
        _builder(subject, issuer.subject, key, authority.public_key(), end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .sign(authority, hashes.SHA384())
    )


def names_of(path: Path) -> list[str]:
    """The names and addresses for which the certificate in ``path`` holds."""
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        raise ShoalError(f"{path} can't be read as a certificate ({error}).") from None
    return [str(name.value) for name in names]


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_until(0) - EARLY)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _until(days: int) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)


def _key_usage(*wanted: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{use: use in wanted for use in _USES})


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
