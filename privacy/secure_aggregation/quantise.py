"""Fixed-point vectors in Z_{2^b}, whose sums can't wrap around.

    encode(x, w) = [round(s w x), w] mod 2^b,      decode(sum_i encode(x_i, w_i)) = (sum_i w_i x_i, sum_i w_i)

with ``s`` the scale (integers per unit) and integer weights ``1 <= w_i <= max_weight``; negative numbers are stored as
their two's complement. A sum over ``n`` clients is right if no coordinate leaves the signed range:

    n ceil(s max_weight clip) + noise_room <= 2^(b-1) - 1,      n max_weight <= 2^(b-1) - 1

which is checked at construction. Every client adds at most ``1/s`` to the error of a coordinate of the sum (``1/(2s)``
with rounding to the nearest), whatever its weight, as the product ``w x`` is rounded and not ``x``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fl.config import setting
from fl.errors import ConfigError, ShoalError

LARGEST = 2**40  # of one client's integers: a float64 product is then within 2^-13 of the exact one


@dataclass(frozen=True)
class Quantiser:
    """Vectors with ``max_j |x_j| <= clip`` (``norm=coordinate``) or ``||x||_2 <= clip`` (``l2``), as integers mod 2^b.

    ``noise_room`` is what the sum of all clients' integer noise may reach in a coordinate, in integers (not units of
    ``x``). Raises `ConfigError`, with the numbers, where a sum of ``clients`` vectors could wrap around.
    """

    clip: float = setting(gt=0, help="largest absolute coordinate, or L2 norm, of a client's vector")
    clients: int = setting(ge=1, help="most clients in a sum")
    scale: float = setting(gt=0, help="integers per unit: the resolution is 1/scale")
    max_weight: int = setting(1, ge=1, help="largest weight of a client; weights are integers")
    modulus_bits: int = setting(32, choices=(32, 64), help="b of Z_{2^b}: bits that a coordinate takes in a message")
    norm: str = setting("coordinate", choices=("coordinate", "l2"), help="what clip bounds: coordinate or l2")
    outside: str = setting("error", choices=("error", "clip"), help="a vector outside the range: error, or clip it")
    noise_room: int = setting(0, ge=0, help="head room for the sum of integer noise, in integers")

    def __post_init__(self) -> None:
        if self.modulus_bits not in (32, 64):
            raise ConfigError("quantiser.modulus_bits", self.modulus_bits, "it must be 32 or 64")
        for key, values in (("norm", ("coordinate", "l2")), ("outside", ("error", "clip"))):
            if getattr(self, key) not in values:
                raise ConfigError(f"quantiser.{key}", getattr(self, key), f"it must be {' or '.join(values)}")
        for key in ("clip", "scale"):
            if not (0 < getattr(self, key) < math.inf):
                raise ConfigError(f"quantiser.{key}", getattr(self, key), "it must be positive and finite")
        for key, least in (("clients", 1), ("max_weight", 1), ("noise_room", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"quantiser.{key}", getattr(self, key), f"it must be at least {least}")
        one = self.scale * self.max_weight * self.clip
        if one > LARGEST:
            raise ConfigError(
                "quantiser.scale",
                self.scale,
                f"scale x max_weight x clip = {one:.6g} must not exceed 2^40, where float64 products lose the last bit",
                f"Use a scale of at most {LARGEST / (self.max_weight * self.clip):.6g}.",
            )
        need = self.clients * max(math.ceil(one), self.max_weight) + self.noise_room
        if need > self.half - 1:
            room = (self.half - 1 - self.noise_room) / self.clients
            way_out = "Use modulus_bits=64." if self.modulus_bits == 32 else "Use a smaller scale."
            if room >= max(2, self.max_weight):
                way_out = f"Use a scale below {(room - 1) / (self.max_weight * self.clip):.6g}, or modulus_bits=64."
            raise ConfigError(
                "quantiser.scale",
                self.scale,
                f"a sum could wrap around: {self.clients} clients x {max(math.ceil(one), self.max_weight)} "
                f"(scale x max_weight {self.max_weight} x clip {self.clip:g}) + noise_room {self.noise_room} = {need} "
                f"exceeds {self.half - 1} = 2^{self.modulus_bits - 1} - 1",
                way_out,
            )

    @property
    def half(self) -> int:
        """2^(b-1): sums are in [-half, half)."""
        return 2 ** (self.modulus_bits - 1)

    @property
    def dtype(self) -> np.dtype:
        """The unsigned, little-endian type of encoded vectors."""
        return np.dtype(f"<u{self.modulus_bits // 8}")

    def error_bound(self, clients: int, stochastic: bool = True) -> float:
        """The largest error of a coordinate of a decoded sum of ``clients`` vectors, but for float64's own rounding."""
        return clients / self.scale * (1.0 if stochastic else 0.5)

    def norm_bound(self, length: int, stochastic: bool = True) -> float:
        """The largest L2 norm of `integers` of a vector ``(length,)`` with ``||x||_2 <= clip`` and the largest weight.

        ``s max_weight clip + sqrt(length)`` (half the root with rounding to the nearest), by the triangle inequality.
        """
        return self.scale * self.max_weight * self.clip + math.sqrt(length) * (1.0 if stochastic else 0.5)

    def integers(self, vector: np.ndarray, weight: int = 1, generator: np.random.Generator | None = None) -> np.ndarray:
        """``round(s weight vector)`` as int64 ``(d,)``: unbiased with a ``generator``, else to the nearest.

        Unbiased: ``floor(v)`` plus one with probability ``v - floor(v)``. Raises `ShoalError` for numbers that are not
        finite, for weights that are not allowed, and for vectors outside the range unless ``outside=clip``.
        """
        if not 1 <= weight <= self.max_weight or weight != int(weight):
            raise ShoalError(f"A client's weight is {weight}; allowed are the integers 1 to {self.max_weight}.")
        vector = self._inside(np.asarray(vector, np.float64))
        exact = vector * (self.scale * int(weight))
        if generator is None:
            return np.rint(exact).astype(np.int64)
        low = np.floor(exact)
        return (low + (generator.random(len(exact)) < exact - low)).astype(np.int64)

    def encode(
        self,
        vector: np.ndarray,
        weight: int = 1,
        generator: np.random.Generator | None = None,
        noise: np.ndarray | None = None,
    ) -> np.ndarray:
        """``(d + 1,)`` unsigned: `integers` plus integer ``noise`` ``(d,)``, and the weight behind them, mod 2^b."""
        whole = self.integers(vector, weight, generator)
        if noise is not None:
            if noise.shape != whole.shape or noise.dtype.kind != "i":
                raise ShoalError(f"Noise {noise.dtype}{noise.shape} must be integers of shape {whole.shape}.")
            whole += noise
        return np.append(whole, np.int64(weight)).astype(self.dtype)

    def decode(self, total: np.ndarray) -> tuple[np.ndarray, int]:
        """``(sum_i w_i x_i  (d,) float64, sum_i w_i)`` from the sum mod 2^b of encoded vectors, ``(d + 1,)``."""
        if total.dtype != self.dtype or total.ndim != 1 or len(total) < 1:
            raise ShoalError(f"A sum {total.dtype}{total.shape} must be a vector of {self.dtype}.")
        signed = total.view(self.dtype.str.replace("u", "i"))
        return signed[:-1].astype(np.float64) / self.scale, int(signed[-1])

    def _inside(self, vector: np.ndarray) -> np.ndarray:
        if vector.ndim != 1 or not np.isfinite(vector).all():
            raise ShoalError(f"A vector of shape {vector.shape} must have one dimension and finite numbers.")
        size = float(np.abs(vector).max(initial=0.0) if self.norm == "coordinate" else np.linalg.norm(vector))
        if size <= self.clip:
            return vector
        if self.outside == "error":
            what = "largest coordinate" if self.norm == "coordinate" else "L2 norm"
            raise ShoalError(
                f"A vector's {what} is {size:.6g}; allowed is {self.clip:g}. Clip it, or use outside=clip."
            )
        if self.norm == "coordinate":
            return np.clip(vector, -self.clip, self.clip)
        return vector * (self.clip / size)


def finest_scale(clip: float, clients: int, max_weight: int = 1, modulus_bits: int = 32, noise_room: int = 0) -> float:
    """The largest power of two that `Quantiser` accepts as ``scale`` for these; raises `ConfigError` where none is."""
    room = (2 ** (modulus_bits - 1) - 1 - noise_room) // clients
    if room < max(1, max_weight):
        raise ConfigError(
            "quantiser.clients", clients, f"{modulus_bits} bits leave a client {room} integers", "Use modulus_bits=64."
        )
    return 2.0 ** math.floor(math.log2(min(room, LARGEST) / (max_weight * clip)))
