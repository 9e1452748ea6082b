"""How a scalar travels: in one byte, or as the four of float32.

``int8log``: bit 7 is the sign, the other seven are a code ``c`` of the magnitude. With ``a = 8 ln |g|``::

    c = 0                                   where |g| < m / 2       (the one code for zero is the byte 0)
    c = 64 + clamp(round(a), -63, 63)       elsewhere
    decoded = sign(g) exp((c - 64) / 8),    m = exp(-63/8) = 3.8e-4,   M = exp(63/8) = 2631

Error. Between m and M, rounding moves ``a`` by 1/2 at most, so the decoded value is g times a factor within
``exp(-1/16)`` and ``exp(1/16)``: relative error at most exp(1/16) - 1 = 6.45 %. Below m the nearer of 0 and m is taken:
absolute error at most m / 2 = 1.9e-4. Above M the value saturates at M. So for every |g| <= M::

    |decoded - g| <= max((exp(1/16) - 1) |g|, m / 2)

Decoding is a table of 256 float32 numbers; the byte 128 (a minus sign before zero) stands for nothing and is refused.
The published program of Just One Byte (arXiv 2306.10015) uses exponents of 1/16 from -127 to 127, which with the sign
are 510 levels: nine bits.
"""

from __future__ import annotations

import numpy as np

from fl.errors import ShoalError

STEP, CENTRE = 8, 64  # codes of the magnitude for each factor e; the code of magnitude 1
LARGEST = CENTRE - 1
SMALLEST_VALUE = float(np.exp(-LARGEST / STEP))
RELATIVE_ERROR = float(np.expm1(1 / (2 * STEP)))
WIDTH = {"int8log": 1, "none": 4}  # bytes of a scalar

_SIGN = 128
_MAGNITUDES = np.exp((np.arange(128) - CENTRE) / STEP)
_MAGNITUDES[0] = 0.0
_TABLE = np.concatenate([_MAGNITUDES, -_MAGNITUDES]).astype(np.float32)
_TABLE[_SIGN] = np.nan


def encode(values: np.ndarray, quantiser: str) -> np.ndarray:
    """``(S,)`` numbers as ``(S width,)`` bytes. Raises `ShoalError` unless all are finite."""
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise ShoalError(f"a scalar is {values[~np.isfinite(values)][0]}; only finite numbers travel")
    if quantiser == "none":
        return np.frombuffer(values.astype("<f4").tobytes(), np.uint8)
    magnitude = np.abs(values)
    some = magnitude >= SMALLEST_VALUE / 2
    rounded = np.rint(STEP * np.log(np.where(some, magnitude, 1.0)))
    codes = CENTRE + np.clip(rounded, -LARGEST, LARGEST).astype(np.int64)
    return np.where(some, codes + _SIGN * (values < 0), 0).astype(np.uint8)


def decode(payload: np.ndarray, quantiser: str) -> np.ndarray:
    """The numbers ``(S,)`` float32 that `encode` put into ``payload``.

    Raises `ShoalError` for bytes that it can't have made.
    """
    if quantiser == "none":
        if len(payload) % 4:
            raise ShoalError(f"{len(payload)} bytes are no whole number of float32")
        values = np.frombuffer(payload.tobytes(), "<f4").astype(np.float32)
    else:
        values = _TABLE[payload]
    if not np.isfinite(values).all():
        raise ShoalError("a byte stands for no number")
    return values
