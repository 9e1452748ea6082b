"""A client's proof, on secret shares, that the L2 norm of its integer vector is at most C.

Two or more servers hold additive shares mod p = 2^61 - 1 of x, (d,), and of what the client sends beside it; each
accepts or rejects x without learning more, and the shares of accepted clients add up to shares of the sum. This is the
check that DP-BREM+ (arXiv 2306.12608) asks for, in the manner of Prio (Corrigan-Gibbs and Boneh 2017, eprint 2019/188
for the proof of sums of squares). Three statements together say that the integer norm is at most C:

1. *No wrap-around.* For 128 rows r of -1, 0, 1 (probabilities 1/4, 1/2, 1/4) the client gives shares of the bits of
   y_r = <r, x>, which says -B <= y_r < B with B = 2^(w-1). If some |x_j| mod p exceeds 2B, a row misses that range with
   probability 1/2 at least: for given other entries, two of the values that r_j may take differ by x_j in <r, x>. So
   |x_j| <= 2B for all j, but for probability 2^-128. The rows are the hash of all shares of x (and of blinds).
2. *Norm.* sum_j x_j^2 = C^2 - S mod p, with shares of the v bits of S. As d (2B)^2 < p - 2^v, it holds in integers.
3. *Bits are bits.* b (b - 1) = 0.

Squares are proved by polynomials. The entries of x fill a matrix (M, L); f_l has degree M, the values of column l at
1, ..., M, and a random value at 0. The client sends shares of q = sum_l f_l^2 (2M + 1 values). The servers compute
their shares of f_l(r) and q(r) at a point r that they drew together, open these, and compare. Where q is wrong, it
agrees at 2M points at most. For the bits, q_g = f_g (f_g - 1) for each column g, and its values at 1, ..., w are zero
because nobody sends them.

*Soundness*: a client with ||x||_2 > C is accepted with probability at most 2 max(M, w) / (p - 2 max(M, w) - 1)
+ h 2^-128 after h hashes; it must not know the servers' query key when it sends, and a key must serve one round.
*Privacy*: all but one of the servers, together, if they follow the protocol, learn nothing but that an honest client
is accepted: what is opened are values masked by those at 0, and zeros. *Completeness*: an honest client fails to
prove with probability 2^-40. Not covered: servers that cheat (they can spoil the sum, or learn x), and anything else
about x than its norm.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fl.errors import ConfigError, ShoalError
from privacy.secure_aggregation import field
from privacy.secure_aggregation.field import P
from privacy.secure_aggregation.primitives import KEY_BYTES, derive

ROWS = 128  # projections
POINTS = 64  # M: more makes openings shorter and proofs slower
FAILURE = 2.0**-40  # of an honest client
_CHUNK = 4096  # columns of projections at a time: sums of 31-bit numbers stay exact in float64


@dataclass(frozen=True)
class NormCheck:
    """Vectors of ``length`` integers with L2 norm at most ``bound``, shared among ``servers``.

    Raises `ConfigError` if the bound is too large for the length: ``4^w d < 2^61`` where ``2^(w-1) > 5.8 bound``.
    """

    length: int
    bound: int
    servers: int = 2

    def __post_init__(self) -> None:
        if self.length < 1 or self.bound < 1 or self.servers < 2:
            raise ConfigError(
                "norm_check", self, "length and bound must be at least 1, and there must be at least 2 servers"
            )
        if POINTS * self.columns * 4**self.width >= P - 2**self.slack_bits:
            raise ConfigError(
                "norm_check.bound",
                self.bound,
                f"{POINTS * self.columns} entries x (2 x 2^{self.width - 1})^2 must be below 2^61 - 1 - "
                f"2^{self.slack_bits}, or squares could wrap around",
                "Use a smaller scale for the integers.",
            )

    @property
    def columns(self) -> int:
        """L: polynomials for the entries."""
        return -(-self.length // POINTS)

    @property
    def width(self) -> int:
        """w: bits of a projection. |<r, x>| > t ||x|| has probability at most 2 exp(-t^2) (Hoeffding)."""
        reach = math.ceil(self.bound * math.sqrt(math.log(2 * ROWS / FAILURE)))
        return reach.bit_length() + 1

    @property
    def slack_bits(self) -> int:
        """v: bits of S = C^2 - sum_j x_j^2."""
        return (self.bound**2).bit_length()

    @property
    def groups(self) -> int:
        """Polynomials for the bits: a column of w bits for each projection, and those of S."""
        return ROWS + -(-self.slack_bits // self.width)

    @property
    def elements(self) -> int:
        """Length of a share: x and its masks, q, the bits and their masks, and the q_g without their zeros."""
        return sum(self._sizes())

    def soundness_log2(self) -> float:
        """log2 of the probability that a vector of larger norm is accepted, but for hashing."""
        roots = 2 * max(POINTS, self.width)
        return math.log2(roots / (P - roots - 1))

    def prove(self, integers: np.ndarray, secret: bytes, context: str, client: int) -> list[bytes]:
        """A message for each server, from int64 ``(length,)``; the last is the long one, the others hold a seed.

        ``secret`` is 32 bytes known to the client alone, for this proof alone. Raises `ShoalError` for a norm above
        the bound.
        """
        if integers.shape != (self.length,) or integers.dtype != np.int64:
            raise ShoalError(f"A vector {integers.dtype}{integers.shape} must be int64 of shape ({self.length},).")
        large = integers[(integers > self.bound) | (integers < -self.bound)]  # their squares could leave int64
        square = sum(int(v) ** 2 for v in large) or int(integers @ integers)
        if square > self.bound**2:
            raise ShoalError(f"A vector's L2 norm is {math.sqrt(square):.6g}; the bound is {self.bound}. Clip it.")
        commitment = self._commit(field.encode(integers), secret, context, client)
        numbers = [int(y) + 2 ** (self.width - 1) for y in field.decode(commitment[-1])]
        if not all(0 <= n < 2**self.width for n in numbers):
            raise ShoalError("A projection of the vector is out of range (once in 2^40 proofs). Use another secret.")
        slack = self.bound**2 - square
        numbers += [(slack >> self.width * k) % 2**self.width for k in range(self.groups - ROWS)]
        bits = (np.array(numbers, np.uint64)[None, :] >> np.arange(self.width, dtype=np.uint64)[:, None]) & np.uint64(1)
        return self._prove(commitment, bits, secret, context, client)

    def _commit(
        self, vector: np.ndarray, secret: bytes, context: str, client: int
    ) -> tuple[np.ndarray, list[bytes], list[bytes], np.ndarray]:
        """The padded x, the heads of the messages, the seeds of the shares but the last, and the projections mod p."""
        x = np.zeros(POINTS * self.columns, np.uint64)
        x[: self.length] = vector
        blinds = [derive(secret, "blind", context, client, s) for s in range(self.servers)]
        seeds = [derive(secret, "shares", context, client, s) for s in range(self.servers - 1)]
        shares = [field.draw(seed, self.elements)[: len(x)] for seed in seeds]
        shares.append(field.subtract(x, field.total(np.stack(shares))))
        hashes = [_hash(blind, share) for blind, share in zip(blinds, shares, strict=True)]
        heads = [blind + b"".join(hashes) for blind in blinds]
        return x, heads, seeds, self._project(x, self._rows(hashes, context, client))

    def _prove(self, commitment: tuple, bits: np.ndarray, secret: bytes, context: str, client: int) -> list[bytes]:
        """The messages, for ``bits`` ``(w, groups)``."""
        x, heads, seeds, _ = commitment
        masks = field.draw(derive(secret, "masks", context, client), self.columns + self.groups)
        f = np.concatenate([masks[None, : self.columns], x.reshape(POINTS, self.columns)])
        f = np.concatenate([f, field.extend(f)])
        q = field.total(field.multiply(f, f).T)
        g = np.concatenate([masks[None, self.columns :], bits])
        g = np.concatenate([g[:1], field.extend(g)])  # between them q_g is zero
        q_g = field.multiply(g, field.subtract(g, np.ones_like(g)))
        whole = np.concatenate([x, f[0], q, bits.ravel(), g[0], q_g.ravel()])
        rest = field.total(np.stack([field.draw(seed, self.elements) for seed in seeds]))
        bodies = [*seeds, field.subtract(whole, rest).astype("<u8").tobytes()]
        return [head + body for head, body in zip(heads, bodies, strict=True)]

    def open(self, server: int, message: bytes, context: str, client: int, query: bytes) -> tuple[np.ndarray, bytes]:
        """``(share (length,) of x, opening)``: what ``server`` (from 0) keeps of a message and tells the others.

        ``query`` is 32 bytes that the servers share and clients don't know. Raises `ShoalError` for what is no proof.
        """
        head = KEY_BYTES * (1 + self.servers)
        last = server == self.servers - 1
        if len(message) != head + (8 * self.elements if last else KEY_BYTES):
            raise ShoalError(f"Client {client}'s proof for server {server} has {len(message)} bytes.")
        share = (
            np.frombuffer(message[head:], "<u8").astype(np.uint64)
            if last
            else field.draw(message[head:], self.elements)
        )
        if (share >= P).any():
            raise ShoalError(f"Client {client}'s share holds numbers that are not below 2^61 - 1.")
        x, x_masks, q, bits, bit_masks, q_g = np.split(share, np.cumsum(self._sizes())[:-1])
        f = np.concatenate([x_masks, x]).reshape(POINTS + 1, self.columns)
        bits, q_g = bits.reshape(self.width, self.groups), q_g.reshape(self.width + 1, self.groups)
        point = self._point(query)
        zeros = np.zeros((self.width, self.groups), np.uint64)
        at_point = [
            field.evaluate(f, point),
            field.evaluate(q[:, None], point),
            field.evaluate(np.concatenate([bit_masks[None], bits]), point),
            field.evaluate(np.concatenate([q_g[:1], zeros, q_g[1:]]), point),
        ]
        hashes = [message[at : at + KEY_BYTES] for at in range(KEY_BYTES, head, KEY_BYTES)]
        values = field.total(field.multiply((1 << np.arange(self.width))[:, None], bits))  # (groups,)
        if server == 0:  # constants are added once
            values[:ROWS] = field.subtract(values[:ROWS], field.encode(np.array([2 ** (self.width - 1)])))
        projections = self._project(x, self._rows(hashes, context, client))
        slack = [field.multiply(v, pow(2, self.width * k, P)) for k, v in enumerate(values[ROWS:])]
        norm = field.total(np.array([*q[1 : POINTS + 1], *slack], np.uint64)[:, None])
        if server == 0:
            norm = field.subtract(norm, np.array([self.bound**2 % P], np.uint64))
        checks = [field.subtract(values[:ROWS], projections), norm]
        own = _hash(message[:KEY_BYTES], x)
        opening = own + b"".join(hashes) + np.concatenate(at_point + checks).astype("<u8").tobytes()
        return x[: self.length], opening

    def accept(self, openings: Sequence[bytes]) -> bool:
        """Whether the openings of all servers, in their order, prove the norm."""
        head = KEY_BYTES * (1 + self.servers)
        sizes = [self.columns, 1, self.groups, self.groups, ROWS + 1]
        if len(openings) != self.servers or any(len(o) != head + 8 * sum(sizes) for o in openings):
            raise ShoalError(
                f"{len(openings)} openings of {[len(o) for o in openings]} bytes for {self.servers} servers."
            )
        hashes = b"".join(opening[:KEY_BYTES] for opening in openings)
        opened = field.total(np.stack([np.frombuffer(o[head:], "<u8").astype(np.uint64) for o in openings]))
        f, q, g, q_g, zeros = np.split(opened, np.cumsum(sizes)[:-1])
        return (
            all(opening[KEY_BYTES:head] == hashes for opening in openings)
            and bool((field.total(field.multiply(f, f)[:, None]) == q).all())
            and bool((field.multiply(g, field.subtract(g, np.ones_like(g))) == q_g).all())
            and not zeros.any()
        )

    def _sizes(self) -> list[int]:
        bits = self.width * self.groups
        return [POINTS * self.columns, self.columns, 2 * POINTS + 1, bits, self.groups, bits + self.groups]

    def _point(self, query: bytes) -> int:
        """r: uniform among the elements that are no point of a polynomial, within 2^-190."""
        first = 2 * max(POINTS, self.width) + 1
        return first + int.from_bytes(derive(query, "norm check"), "little") % (P - first)

    def _rows(self, hashes: Sequence[bytes], context: str, client: int) -> bytes:
        return derive(b"".join(hashes), "rows", context, client, self.length, self.bound)

    def _project(self, x: np.ndarray, seed: bytes) -> np.ndarray:
        """``(ROWS,)``: <r, x> mod p for the rows r of -1, 0, 1 that are drawn from ``seed``."""
        stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
        halves = np.stack([x >> np.uint64(31), x & np.uint64(2**31 - 1)], axis=1).astype(np.float64)
        out = np.zeros((ROWS, 2), np.int64)
        for start in range(0, len(x), _CHUNK):
            part = halves[start : start + _CHUNK]
            drawn = np.frombuffer(stream.update(bytes(2 * ROWS * len(part) // 8)), np.uint8)
            signs = np.unpackbits(drawn).reshape(2, ROWS, len(part)).astype(np.float64)
            out += ((signs[0] - signs[1]) @ part).astype(np.int64)
        return field.reduce(field.multiply(field.encode(out[:, 0]), 2**31) + field.encode(out[:, 1]))


def _hash(blind: bytes, share: np.ndarray) -> bytes:
    return hashlib.sha256(blind + share.astype("<u8").tobytes()).digest()
