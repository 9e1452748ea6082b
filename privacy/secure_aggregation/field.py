"""Vectors and polynomials over the integers mod p = 2^61 - 1, in uint64.

A polynomial of degree n is kept as its values at the points 0, ..., n. With Lagrange's weights at r,

    f(r) = sum_m w_m(r) f(m),   w_m(r) = prod_{k != m} (r - k) / (m - k),

which is linear in the values and so can be done on additive shares of them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

P = 2**61 - 1
_P, _LOW, _30, _31, _32, _61 = (np.uint64(v) for v in (P, 2**31 - 1, 30, 31, 32, 61))


def reduce(values: np.ndarray) -> np.ndarray:
    """``values`` (any uint64) mod p."""
    values = (values & _P) + (values >> _61)
    return values - _P * (values >= _P)


def multiply(a: np.ndarray | int, b: np.ndarray | int) -> np.ndarray:
    """``a b mod p`` by entry, for entries below p: products of halves of 31 bits, with 2^61 = 1."""
    a, b = np.asarray(a, np.uint64), np.asarray(b, np.uint64)
    a1, a0, b1, b0 = a >> _31, a & _LOW, b >> _31, b & _LOW
    middle = a1 * b0 + a0 * b1  # below 2^62, and stands for 2^31 times itself
    high = ((a1 * b1) << np.uint64(1)) + (middle >> _30)
    return reduce(high + ((middle & (_LOW >> np.uint64(1))) << _31) + a0 * b0)


def subtract(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return reduce(a + (_P - b))


def total(values: np.ndarray) -> np.ndarray:
    """The sum over the first axis mod p, of entries below p (fewer than 2^28 of them)."""
    low = (values & np.uint64(2**32 - 1)).sum(axis=0, dtype=np.uint64)
    high = (values >> _32).sum(axis=0, dtype=np.uint64)
    return reduce(reduce(low) + multiply(reduce(high), 2**32))


def encode(integers: np.ndarray) -> np.ndarray:
    """Integers (int64, of absolute value below p) as elements of the field."""
    return np.where(integers < 0, integers + P, integers).astype(np.uint64)


def decode(values: np.ndarray) -> np.ndarray:
    """The representatives of least absolute value, int64."""
    signed = values.astype(np.int64)
    return np.where(signed > P // 2, signed - P, signed)


def draw(seed: bytes, count: int) -> np.ndarray:
    """``(count,)`` uniform elements from a 32-byte seed that serves nothing else: AES-256-CTR, 61 bits of each 64."""
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    out = np.frombuffer(stream.update(bytes(8 * count)), "<u8").astype(np.uint64) & _P
    while (bad := np.flatnonzero(out == _P)).size:  # once in 2^61
        out[bad] = np.frombuffer(stream.update(bytes(8 * bad.size)), "<u8") & _P
    return out


@lru_cache(maxsize=1024)
def weights(degree: int, point: int) -> np.ndarray:
    """``(degree + 1,)``: Lagrange's weights at ``point``, which must not be one of 0, ..., degree."""
    above, out = 1, []
    for k in range(degree + 1):
        above = above * (point - k) % P
    for m in range(degree + 1):
        below = (point - m) % P
        for k in range(degree + 1):
            if k != m:
                below = below * (m - k) % P
        out.append(above * pow(below, -1, P) % P)
    return np.array(out, np.uint64)


def evaluate(values: np.ndarray, point: int) -> np.ndarray:
    """``(...)``: the polynomials with values ``(n + 1, ...)`` at ``point``, mod p."""
    shape = (-1,) + (1,) * (values.ndim - 1)
    return total(multiply(weights(len(values) - 1, point).reshape(shape), values))


def extend(values: np.ndarray) -> np.ndarray:
    """``(n, ...)``: the polynomials with values ``(n + 1, ...)`` at n + 1, ..., 2n."""
    degree = len(values) - 1
    return np.stack([evaluate(values, point) for point in range(degree + 1, 2 * degree + 1)])
