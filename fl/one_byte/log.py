"""The log of the scalars: what a round was, how it travels to those who missed it, and what applying it does.

Round t with the peers ``M_t`` that took part, of which peer k sent ``S_k`` scalars ``g_ks``, n in all::

    for k in M_t, rising, for s = 0 .. S_k - 1:    theta <- theta - lr_t g_ks z(t, k, s) / norm,    norm = n or sqrt(n)

``lr_t`` follows from the settings, which every peer has. So a round is the set of its peers and their bytes, and the
whole state is theta_0 and the log. ``g`` is the decoded value, clipped to ``[-clip_g, clip_g]``; the sender applies it
as the others do. Just One Byte, arXiv 2306.10015; its program divides by sqrt(n), the mean over directions by n.

Packed, K peers in all, a round is ``ceil(K / 8)`` bytes of a bitmap of ``M_t`` (bit k mod 8 of byte k div 8), and for
each of these peers a byte ``S_k`` and its scalars.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fl.errors import ShoalError
from fl.one_byte.codec import WIDTH, decode
from fl.one_byte.directions import direction, step


@dataclass(frozen=True)
class Entry:
    """One round of the log: the bytes that each peer sent, by peer, rising."""

    round: int
    payloads: tuple[tuple[int, bytes], ...]

    @classmethod
    def of(cls, round: int, payloads: Mapping[int, np.ndarray]) -> Entry:
        """The entry of ``payloads``, by peer."""
        return cls(round, tuple((k, payloads[k].tobytes()) for k in sorted(payloads)))

    def pack(self, number: int, quantiser: str) -> bytes:
        """The entry as it travels, ``number`` peers in all."""
        bitmap = np.zeros(number, np.uint8)
        bitmap[[k for k, _ in self.payloads]] = 1
        own = b"".join(bytes([len(p) // WIDTH[quantiser]]) + p for _, p in self.payloads)
        return np.packbits(bitmap, bitorder="little").tobytes() + own


def unpack(data: bytes, first: int, number: int, quantiser: str) -> list[Entry]:
    """The entries of the rounds from ``first`` on that `Entry.pack` put one after another.

    Raises `ShoalError` where ``data`` is none of that.
    """
    entries: list[Entry] = []
    at, head = 0, -(-number // 8)
    while at < len(data):
        bitmap = np.unpackbits(np.frombuffer(data[at : at + head], np.uint8), bitorder="little")
        if len(bitmap) < number or bitmap[number:].any():
            raise ShoalError("the log names peers that don't exist, or ends within a round")
        at += head
        payloads = []
        for peer in np.flatnonzero(bitmap).tolist():
            end = at + 1 + (data[at] * WIDTH[quantiser] if at < len(data) else 0)
            if end > len(data):
                raise ShoalError("the log ends within a round")
            payloads.append((peer, data[at + 1 : end]))
            at = end
        entries.append(Entry(first + len(entries), tuple(payloads)))
    return entries


@dataclass(frozen=True)
class Rule:
    """What all peers must agree on to turn the log into a state.

    ``columns`` ``(n,)`` are those of the state that train; ``lrs`` the learning rate of each round, from round 1.
    """

    seed: int
    columns: np.ndarray
    lrs: Sequence[float]
    quantiser: str = "int8log"
    norm: str = "n"
    clip_g: float | None = None

    def values(self, payload: np.ndarray) -> np.ndarray:
        """The scalars ``(S,)`` float32 of a payload, as everybody applies them."""
        found = decode(payload, self.quantiser)
        return found if self.clip_g is None else np.clip(found, -self.clip_g, self.clip_g)

    def steps(self, entry: Entry) -> Iterator[tuple[int, int, np.float32]]:
        """The peer, the sample and the coefficient of each step of ``entry``, in their order.

        Raises `ShoalError` for bytes that stand for no scalars.
        """
        values = [(k, self.values(np.frombuffer(p, np.uint8))) for k, p in entry.payloads]
        n = sum(len(own) for _, own in values)
        scale = self.lrs[entry.round - 1] / (n if self.norm == "n" else math.sqrt(n)) if n else 0.0
        return ((k, s, np.float32(scale * float(g))) for k, own in values for s, g in enumerate(own))

    def apply(self, states: Sequence[np.ndarray], entry: Entry) -> None:
        """Apply ``entry`` in place to each of ``states`` ``(d,)`` float32, every one by itself.

        A direction is drawn once for all of them; the arithmetic of one does not touch another.
        """
        whole = [len(state) == len(self.columns) for state in states]
        own = [state if all_of_it else state[self.columns] for state, all_of_it in zip(states, whole)]
        for peer, sample, coefficient in self.steps(entry):
            step(own, direction(len(self.columns), self.seed, entry.round, peer, sample), coefficient)
        for state, all_of_it, values in zip(states, whole, own):
            if not all_of_it:
                state[self.columns] = values
