"""What a message between nodes looks like: a header of 48 bytes in network order, then the numbers, little endian.

====== ============================================================
bytes  holds
====== ============================================================
4      ``SHPT``
2      the format's version, 1
2      type of the numbers: 0 (there are none), 1 float32, 2 float64
16     the run
8      the round
4, 4   from, to (clients)
8      how many numbers
====== ============================================================

Nothing is unpickled. A receiver knows what it expects, so a header that says anything else ends the connection before
its numbers are read. That nobody changed a frame on the way is TLS's business.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from fl.errors import ShoalError

MAGIC, VERSION = b"SHPT", 1
HEADER = struct.Struct(">4sHH16sQIIQ")
_TYPES = {"": 0, "float32": 1, "float64": 2}
_NAMES = {code: name for name, code in _TYPES.items()}
_WIDTH = {"": 0, "float32": 4, "float64": 8}


class BadFrame(ShoalError):
    """A frame that is not what it should be; ``reason`` is for counting."""

    def __init__(self, reason: str, text: str):
        self.reason = reason
        super().__init__(text)


@dataclass(frozen=True)
class Head:
    """A frame's header. ``dtype`` is empty where the sender takes no part in the round."""

    run: bytes
    round: int
    src: int
    dst: int
    dtype: str
    length: int

    @property
    def bytes(self) -> int:
        """Bytes of the numbers that follow."""
        return _WIDTH[self.dtype] * self.length


def size(vector: np.ndarray | None) -> int:
    """Bytes of the frame that carries ``vector``."""
    return HEADER.size + (0 if vector is None else vector.nbytes)


def pack(run: bytes, round: int, src: int, dst: int, vector: np.ndarray | None) -> bytes:
    """The frame of ``vector`` ``(n,)``, of float32 or float64; None: ``src`` takes no part in the round."""
    dtype, length = ("", 0) if vector is None else (vector.dtype.name, len(vector))
    header = HEADER.pack(MAGIC, VERSION, _TYPES[dtype], run, round, src, dst, length)
    return header if vector is None else header + vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()


def read_head(data: bytes) -> Head:
    """The header in ``data``, `HEADER.size` bytes. Raises `BadFrame`."""
    magic, version, code, run, round, src, dst, length = HEADER.unpack(data)
    if magic != MAGIC or version != VERSION:
        raise BadFrame("malformed", f"it begins with {magic!r}, version {version}, not {MAGIC!r}, version {VERSION}")
    if code not in _NAMES or (code == 0) != (length == 0):
        raise BadFrame("malformed", f"{length} numbers of type {code}; types are 0 (none), 1 (float32), 2 (float64)")
    return Head(run, round, src, dst, _NAMES[code], length)


def read_vector(head: Head, data: bytes) -> np.ndarray | None:
    """The numbers of a frame; read-only."""
    return np.frombuffer(data, np.dtype(head.dtype).newbyteorder("<")) if head.dtype else None
