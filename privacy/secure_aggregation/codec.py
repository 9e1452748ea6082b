"""How a client's update becomes the integers that are summed under masks, and how their sum becomes a mean update.

A codec belongs to one round. `Fixed` sums updates as they are, in fixed point; a mechanism that needs noise in the sum
brings its own (`privacy.base.Guard.codec`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from fl.errors import ShoalError
from privacy.secure_aggregation.quantise import Quantiser, finest_scale


class Codec(ABC):
    """``length`` integers of ``dtype`` (uint32 or uint64) for an update of ``size`` numbers.

    A sum of fewer than ``least`` clients is not unmasked; ``most`` is how many it is planned for, beyond which it could
    wrap around.
    """

    least: int = 1
    most: int
    length: int
    dtype: np.dtype

    @abstractmethod
    def encode(
        self, update: np.ndarray, weight: int, rng: np.random.Generator, arrays: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """``(length,)`` of ``update`` ``(size,)``; ``rng`` is the client's own secret one, ``arrays`` the request's.

        Raises `ShoalError` for an update that can't be encoded.
        """

    @abstractmethod
    def decode(self, total: np.ndarray, clients: int) -> np.ndarray:
        """``(size,)`` float64: what an aggregation rule gets, from the sum ``(length,)`` over ``clients``.

        Raises `ShoalError` for a sum that no ``clients`` updates can have: one that masks were left in, since a client
        gave a key that is not its own, say.
        """


class Fixed(Codec):
    """The weighted mean ``sum_i w_i u_i / sum_i w_i``, to within ``clients / (scale sum_i w_i)`` a coordinate."""

    def __init__(self, size: int, clip: float, clients: int, max_weight: int, modulus_bits: int, scale: float | None):
        scale = scale or finest_scale(clip, clients, max_weight, modulus_bits)
        self.quantiser = Quantiser(clip, clients, scale, max_weight, modulus_bits)
        self.length, self.dtype, self.most = size + 1, self.quantiser.dtype, clients

    def encode(
        self, update: np.ndarray, weight: int, rng: np.random.Generator, arrays: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        return self.quantiser.encode(update, weight, rng)

    def decode(self, total: np.ndarray, clients: int) -> np.ndarray:
        q = self.quantiser
        added, weight = q.decode(total)
        largest = float(np.abs(added).max(initial=0.0))
        if not clients <= weight <= clients * q.max_weight or largest > q.clip * weight + q.error_bound(clients):
            raise not_a_sum(clients)
        return added / weight


def not_a_sum(clients: int) -> ShoalError:
    """The error of `Codec.decode`."""
    return ShoalError(f"What was unmasked is not the sum of {clients} encoded updates: a key or a vector was altered.")
