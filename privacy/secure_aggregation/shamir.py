"""Shamir's secret sharing of 32 bytes: any ``threshold`` shares give the secret, fewer say nothing about it.

    f(x) = secret + a_1 x + ... + a_{t-1} x^{t-1} mod p,     share_x = f(x)
    secret = f(0) = sum_x share_x prod_{m != x} m / (m - x)   over any t points x

(Shamir 1979) over the integers mod ``p = 2^256 + 297``, the smallest prime above all 32-byte numbers. A share that was
altered gives another secret: the caller compares what comes out with something public (a public key, a hash).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

from fl.errors import ShoalError

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
_DRAW_BYTES = 48  # reduced mod p: within 2^-128 of uniform


def split(secret: bytes, threshold: int, shares: int, seed: bytes) -> list[bytes]:
    """The shares at x = 1, ..., ``shares``, 33 bytes each; the coefficients are drawn from ``seed`` by SHAKE-256.

    ``seed`` must be secret and serve one secret only. Raises `ShoalError` unless ``1 <= threshold <= shares``.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= shares:
        raise ShoalError(
            f"A {len(secret)}-byte secret in {shares} shares with threshold {threshold}: "
            f"the secret has {SECRET_BYTES} bytes, and the threshold is 1 to the number of shares."
        )
    stream = hashlib.shake_256(seed).digest(_DRAW_BYTES * (threshold - 1))
    draws = (stream[i : i + _DRAW_BYTES] for i in range(0, len(stream), _DRAW_BYTES))
    coefficients = [int.from_bytes(draw, "little") % PRIME for draw in draws]
    out = []
    for x in range(1, shares + 1):
        value = 0
        for coefficient in coefficients:
            value = (value + coefficient) * x % PRIME
        out.append(((value + int.from_bytes(secret, "little")) % PRIME).to_bytes(SHARE_BYTES, "little"))
    return out


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from ``threshold`` or more shares by x. Raises `ShoalError` for too few or what is no share.

    The ``threshold`` shares of lowest x are used. Altered shares give another secret, or, once in 2^247, a number that
    is too large for one.
    """
    if len(shares) < threshold:
        raise ShoalError(f"{len(shares)} shares can't give a secret; {threshold} are needed.")
    chosen = sorted(shares)[:threshold]
    total = 0
    for x, weight in zip(chosen, _weights(tuple(chosen)), strict=True):
        value = int.from_bytes(shares[x], "little")
        if len(shares[x]) != SHARE_BYTES or value >= PRIME:
            raise ShoalError(f"The share at {x} is not a number below 2^256 + 297 in {SHARE_BYTES} bytes.")
        total += weight * value
    total %= PRIME
    if total >= 2**256:
        raise ShoalError("The shares do not belong together: they give no 32-byte secret.")
    return total.to_bytes(SECRET_BYTES, "little")


@lru_cache(maxsize=4096)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at zero; neighbourhoods without dropouts share one set of points."""
    out = []
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        out.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(out)
