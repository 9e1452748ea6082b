"""(n, s) gradient codes: a sum over n chunks from the answers of any n - s of n workers.

Worker i holds s + 1 of the chunks and answers ``l_i = sum_j B_ij g_j``. For survivors I the decoder solves
``B_I^T a = 1``, and then ``sum_{i in I} a_i l_i = sum_j g_j`` (Tandon et al., arXiv 1612.03301).

Weights of a cyclic code reach 10^5, so answers are encoded and decoded in float64: float32 would lose that many digits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from fl.errors import ShoalError
from fl.keys import generator

RESIDUAL = 1e-6  # of B_I^T a = 1, above which survivors can't be decoded
CACHE = 256  # survivor sets whose weights are kept


class Code(ABC):
    """An (n, s) code. ``chunks`` ``(n, s + 1)`` int64: who holds what; ``weights`` ``(n, s + 1)`` float64: ``B_ij``.

    Raises `ShoalError` unless 0 <= s < n.
    """

    chunks: np.ndarray
    weights: np.ndarray

    def __init__(self, n: int, s: int):
        if not 0 <= s < n:
            raise ShoalError(f"A gradient code for {n} workers tolerates 0 to {n - 1} stragglers, not {s}.")
        self.n, self.s = n, s
        self._known: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()

    def encode(self, worker: int, gradients: np.ndarray) -> np.ndarray:
        """``l_i`` ``(d,)`` float64 from all chunks' gradients ``(n, d)`` of any float type."""
        return self.weights[worker] @ gradients[self.chunks[worker]]

    def decode(self, survivors: Iterable[int]) -> np.ndarray | None:
        """``a`` ``(n,)`` float64, zero for all but ``survivors``; None where more than s are missing."""
        alive = tuple(sorted(set(survivors)))
        if len(alive) < self.n - self.s:
            return None
        if alive not in self._known:
            found = self._solve(np.array(alive, dtype=np.int64))
            if found is None:
                return None
            self._known[alive] = found
            if len(self._known) > CACHE:
                self._known.popitem(last=False)
        return self._known[alive]

    @abstractmethod
    def _solve(self, alive: np.ndarray) -> np.ndarray | None: ...


class Cyclic(Code):
    """Worker i holds chunks i .. i + s (mod n), for any s (cyclic repetition).

    ``H`` ``(s, n)`` is Gaussian with rows that sum to 0, drawn from the key (seed, "gradient code", n, s). Row i of B
    is the one direction of its support with ``H B_i = 0``, scaled to length 1: so all rows lie in the null space of H,
    which has dimension n - s and holds the vector of ones, and any n - s of them span it (with probability 1).
    """

    def __init__(self, n: int, s: int, seed: int = 0):
        super().__init__(n, s)
        self.chunks = (np.arange(n)[:, None] + np.arange(s + 1)) % n
        h = generator(seed, "gradient code", n, s).standard_normal((s, n))
        h[:, -1] = -h[:, :-1].sum(1)
        parts = h[:, self.chunks].transpose(1, 0, 2)  # (n, s, s + 1)
        rest = np.linalg.solve(parts[:, :, 1:], -parts[:, :, :1])[:, :, 0]
        rows = np.concatenate([np.ones((n, 1)), rest], axis=1)
        self.weights = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        self._matrix = np.zeros((n, n))
        np.put_along_axis(self._matrix, self.chunks, self.weights, axis=1)

    def _solve(self, alive: np.ndarray) -> np.ndarray | None:
        # The least-norm weights over all survivors: smaller, so more exact, than those over n - s of them.
        part = self._matrix[alive].T
        found = np.linalg.lstsq(part, np.ones(self.n), rcond=None)[0]
        if np.abs(part @ found - 1).max() > RESIDUAL:
            return None
        weights = np.zeros(self.n)
        weights[alive] = found
        return weights


class Fractional(Code):
    """Groups of s + 1 workers that all hold the group's s + 1 chunks; every weight is 1 (fractional repetition).

    One answer of each group is summed, so decoding is exact. Raises `ShoalError` unless s + 1 divides n.
    """

    def __init__(self, n: int, s: int):
        super().__init__(n, s)
        if n % (s + 1):
            raise ShoalError(
                f"Fractional repetition needs a number of workers that s + 1 divides; {n} is no multiple of {s + 1}. "
                "Choose another s, or the cyclic code."
            )
        self.chunks = np.arange(n)[:, None] // (s + 1) * (s + 1) + np.arange(s + 1)
        self.weights = np.ones((n, s + 1))

    def _solve(self, alive: np.ndarray) -> np.ndarray | None:
        # At most s are missing, so that every group has a survivor.
        first = np.unique(alive // (self.s + 1), return_index=True)[1]
        weights = np.zeros(self.n)
        weights[alive[first]] = 1.0
        return weights


def make_code(n: int, s: int, kind: str = "auto", seed: int = 0) -> Code:
    """The code ``kind``: ``cyclic``, ``fractional``, or ``auto``: fractional wherever s + 1 divides n."""
    if kind == "fractional" or (kind == "auto" and 0 <= s < n and n % (s + 1) == 0):
        return Fractional(n, s)
    return Cyclic(n, s, seed)
