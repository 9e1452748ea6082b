"""Lossy compression of a vector for one message: what arrives, and the arrays that carry it.

A compressor is a contraction, ``E ||v - Q(v)||^2 <= (1 - delta) ||v||^2`` with ``delta > 0``, which is what CHOCO-SGD
needs (Koloskova et al., arXiv 1902.00340, assumption 1):

========= ================================================================================ ======================
top_k     the k entries of largest absolute value, and where they are                      delta = k / d
random_k  k drawn entries; who hears them draws the same places                            delta = k / d
qsgd      signs and s levels of |v_i| / ||v||, rounded at random (Alistarh et al.,         delta = 1 / (1 + w),
          arXiv 1610.02132), divided by 1 + w                                              w = min(d/s^2, sqrt(d)/s)
none      v                                                                                delta = 1
========= ================================================================================ ======================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fl.config import setting

Payload = Mapping[str, tuple[str, int]]


@dataclass(frozen=True)
class Compressor(ABC):
    """The group ``schedule/compressor``."""

    @abstractmethod
    def compress(self, vector: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """What arrives of ``vector`` ``(d,)``: the same type and shape."""

    @abstractmethod
    def payload(self, size: int) -> Payload:
        """The arrays (type, length) of a message that carries a compressed vector of ``size`` numbers."""


@dataclass(frozen=True)
class _Part(Compressor):
    fraction: float = setting(0.1, gt=0, le=1, help="k / d: the share of the entries that is sent")

    def count(self, size: int) -> int:
        """``k``, at least 1 where there is anything to send."""
        return min(size, max(1, math.ceil(self.fraction * size - 1e-9)))


@dataclass(frozen=True)
class TopK(_Part):
    """The entries of largest absolute value (the first of equal ones), with their places."""

    def compress(self, vector: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        count = self.count(len(vector))
        out = np.zeros_like(vector)
        if count < len(vector):
            size = np.abs(vector)
            least = np.partition(size, len(vector) - count)[len(vector) - count]
            above = np.flatnonzero(size > least)
            kept = np.concatenate([above, np.flatnonzero(size == least)[: count - len(above)]])
        else:
            kept = np.arange(len(vector))
        out[kept] = vector[kept]
        return out

    def payload(self, size: int) -> Payload:
        return {"values": ("float32", self.count(size)), "places": ("uint32", self.count(size))}


@dataclass(frozen=True)
class RandomK(_Part):
    """Drawn entries. Sender and receivers draw the same places, so these don't travel."""

    def compress(self, vector: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        kept = draw.choice(len(vector), size=self.count(len(vector)), replace=False)
        out = np.zeros_like(vector)
        out[kept] = vector[kept]
        return out

    def payload(self, size: int) -> Payload:
        return {"values": ("float32", self.count(size))}


@dataclass(frozen=True)
class QSGD(Compressor):
    """Random rounding to ``levels`` of the vector's norm: one float32, and ``ceil(log2(2 s + 1))`` bits an entry."""

    levels: int = setting(7, ge=1, le=127, help="s: levels of absolute value above 0")

    @property
    def bits(self) -> int:
        return math.ceil(math.log2(2 * self.levels + 1))

    def compress(self, vector: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        norm = np.float32(np.linalg.norm(vector.astype(np.float64)))
        if norm == 0:
            return np.zeros_like(vector)
        s, d = self.levels, len(vector)
        exact = np.abs(vector.astype(np.float64)) / float(norm) * s
        level = np.floor(exact + draw.random(d))
        scale = float(norm) / s / (1 + min(d / s**2, math.sqrt(d) / s))
        return (np.sign(vector) * level * scale).astype(vector.dtype)

    def payload(self, size: int) -> Payload:
        return {"norm": ("float32", 1), "levels": ("uint8", math.ceil(self.bits * size / 8))}


@dataclass(frozen=True)
class Whole(Compressor):
    """Everything, as float32."""

    def compress(self, vector: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        return vector.copy()

    def payload(self, size: int) -> Payload:
        return {"values": ("float32", size)}
