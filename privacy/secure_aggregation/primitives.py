"""What the protocol takes from cryptography: key agreement, key derivation, mask streams, and messages as bytes.

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), ChaCha20-Poly1305 (RFC 8439), and AES-256 in counter mode as the generator of
masks; the implementations are those of the package `cryptography`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fl.errors import ShoalError
from fl.keys import Part, key_bytes

KEY_BYTES = 32
_BLOCK_BYTES = 1 << 18  # of a mask at a time: stays in the cache
_ZEROS = bytes(_BLOCK_BYTES)


def derive(secret: bytes, *path: Part) -> bytes:
    """32 bytes from ``secret`` for the use that ``path`` names: HKDF-SHA256 with the path's hash as info."""
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=key_bytes("secagg", *path)).derive(secret)


def public_key(private: bytes) -> bytes:
    """The X25519 public key of a 32-byte private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: X25519PrivateKey, public: bytes, *path: Part) -> bytes:
    """32 bytes that the holders of both private keys share, for the use that ``path`` names.

    Raises `ShoalError` for a public key of small order, with which the result would be known to anybody.
    """
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ShoalError(f"A public key can't be used: {error}.") from error
    return derive(secret, *path)


def encrypt(key: bytes, nonce: bytes, text: bytes) -> bytes:
    """The 12-byte ``nonce``, then ChaCha20-Poly1305 of ``text``. A nonce must serve one text only for a key."""
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, None)


def decrypt(key: bytes, ciphertext: bytes) -> bytes:
    """The text; raises `ShoalError` for a ciphertext that was altered or belongs to another key."""
    try:
        return ChaCha20Poly1305(key).decrypt(ciphertext[:12], ciphertext[12:], None)
    except (InvalidTag, ValueError) as error:
        raise ShoalError("A ciphertext was altered, or is of another sender, receiver or round.") from error


def add_mask(total: np.ndarray, seed: bytes, sign: int = 1) -> None:
    """Add (or subtract, ``sign=-1``) to ``total`` ``(d,)``, unsigned, the stream of ``seed`` in place, modulo 2^b.

    The stream is AES-256-CTR of zeros from counter 0, read as little-endian numbers: ``seed`` must serve one use only.
    """
    cipher = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    stream = bytearray(_BLOCK_BYTES + 15)
    step = _BLOCK_BYTES // total.itemsize
    for start in range(0, len(total), step):
        part = total[start : start + step]
        cipher.update_into(memoryview(_ZEROS)[: part.nbytes], stream)
        mask = np.frombuffer(stream, total.dtype, len(part))
        if sign > 0:
            np.add(part, mask, out=part)
        else:
            np.subtract(part, mask, out=part)


def pack(parts: Mapping[int, bytes]) -> bytes:
    """Parts by client as one message: for each, in ascending order, its id and length (4 bytes each), and its bytes."""
    return b"".join(struct.pack("<II", i, len(parts[i])) + parts[i] for i in sorted(parts))


def unpack(message: bytes, sizes: int | None = None) -> dict[int, bytes]:
    """The parts of `pack`, each of ``sizes`` bytes if given. Raises `ShoalError` for anything that `pack` never gives.

    Ids ascend strictly, so a message can't say two things about one client.
    """
    parts: dict[int, bytes] = {}
    at, last = 0, -1
    while at < len(message):
        if at + 8 > len(message):
            raise ShoalError(f"A message ends inside a header, at byte {len(message)}.")
        client, size = struct.unpack_from("<II", message, at)
        at += 8 + size
        if client <= last or at > len(message) or sizes not in (None, size):
            raise ShoalError(f"A message of {len(message)} bytes has a bad part for client {client} ({size} bytes).")
        parts[client] = bytes(message[at - size : at])
        last = client
    return parts
