"""Who shares masks with whom: a k-regular graph over a random order of the clients, or the complete graph.

Harary's graph (Bell et al. 2020, ACM CCS, eprint 2020/704, section 3): the clients stand on a circle in random order
and a client's neighbours are the k/2 before and the k/2 behind it. Its neighbours are then a uniform k-subset of the
others, so with C of n clients colluding and D dropping out, independently of the order,

    P[too many colluders]  <= n P[Hyper(n-1, C, k) >= t]            they could rebuild a client's secrets
    P[disconnected]        <= (n choose 2) prod_{j<k} (C+D-j)/(n-j)  the sum would fall into sums over parts
    P[too few shares]      <= n P[Hyper(n-1, D, k) > k - t]         the sum would be lost

Hyper(N, K, k) counts the marked ones among k drawn of N with K marked. The second line: without C+D clients, what is
left falls apart only if there are two separate runs of k/2 or more missing clients in a row, so two places of the
circle begin windows that together hold k missing clients. The sum of the first two must be at most 2^-security_bits,
the third at most 2^-correctness_bits; the smallest even k for which a threshold t does both is taken, and t in the
middle of those that do. For few clients, and where k would reach n - 1, the graph is complete, and the bounds are
certainties: any t with C < t <= n - 1 - D.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fl.config import setting
from fl.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """A graph's size: ``clients`` n, ``degree`` k, ``threshold`` t, and log2 of the bounds on the failures."""

    clients: int
    degree: int
    threshold: int
    security_log2: float
    correctness_log2: float

    @property
    def complete(self) -> bool:
        return self.degree == self.clients - 1


@dataclass(frozen=True)
class Topology:
    """The fractions of clients that may collude with the server and drop out, and the failures that are accepted."""

    colluding: float = setting(0.1, ge=0, lt=1, help="fraction of the clients that may collude with the server")
    dropout: float = setting(0.1, ge=0, lt=1, help="fraction of the clients that may drop out in a round")
    security_bits: float = setting(40.0, gt=0, help="a sum shows more than it should with probability 2^-this")
    correctness_bits: float = setting(20.0, gt=0, help="a sum is lost with probability 2^-this")
    complete_up_to: int = setting(32, ge=0, help="up to this many clients everybody is everybody's neighbour")

    def plan(self, clients: int) -> Plan:
        """The smallest degree, and a threshold, for ``clients``; raises `ConfigError` where there is none."""
        return _plan(self, clients)

    def missing(self, clients: int) -> tuple[int, int]:
        """``(C, D)``: colluding clients and dropouts that a plan for ``clients`` withstands, rounded up."""
        return math.ceil(self.colluding * clients - 1e-9), math.ceil(self.dropout * clients - 1e-9)


@lru_cache(maxsize=256)
def _plan(topology: Topology, clients: int) -> Plan:
    corrupt, dropped = topology.missing(clients)
    for degree in range(2, clients - 1 if clients > topology.complete_up_to else 0, 2):
        disconnected = log2_disconnected(clients, corrupt + dropped, degree)
        exposed = np.logaddexp2(log2_tails(clients, corrupt, degree), disconnected)
        lost = log2_tails(clients, dropped, degree)[::-1]  # [t]: more than degree - t of the neighbours drop out
        fits = (exposed[:-1] <= -topology.security_bits) & (lost[:-1] <= -topology.correctness_bits)
        fits[:2] = False  # a share must not be the secret itself
        if fits.any():
            t = int(np.flatnonzero(fits)[fits.sum() // 2])
            return Plan(clients, degree, t, float(exposed[t]), float(lost[t]))
    low, high = max(2, corrupt + 1), clients - 1 - dropped
    if low > high:
        raise ConfigError(
            "clients",
            clients,
            f"with {corrupt} colluding and {dropped} dropping out, each of the others needs more than "
            f"{max(1, corrupt)} neighbours that stay",
            "Use more clients, or smaller fractions `colluding` and `dropout`.",
        )
    return Plan(clients, clients - 1, (low + high + 1) // 2, -math.inf, -math.inf)


def neighbours(plan: Plan, ids: Iterable[int], generator: np.random.Generator) -> dict[int, tuple[int, ...]]:
    """Each client's neighbours in ascending order; the order on the circle is drawn from ``generator``."""
    ordered = sorted(ids)
    if len(ordered) != plan.clients:
        raise ValueError(f"{len(ordered)} ids for a plan of {plan.clients}")
    if plan.complete:
        return {i: tuple(j for j in ordered if j != i) for i in ordered}
    circle = [ordered[i] for i in generator.permutation(plan.clients)]
    steps = [s for step in range(1, plan.degree // 2 + 1) for s in (step, -step)]
    return {i: tuple(sorted(circle[(at + s) % plan.clients] for s in steps)) for at, i in enumerate(circle)}


def log2_tails(clients: int, marked: int, degree: int) -> np.ndarray:
    """``(degree + 2,)``: log2 of ``n P[Hyper(n-1, marked, degree) >= c]`` at c = 0 .. degree + 1 (there: ``-inf``)."""
    others = clients - 1
    out = np.full(degree + 2, -np.inf)
    low, high = max(0, degree - (others - marked)), min(marked, degree)
    count = np.arange(low, high + 1)
    terms = _log2_choose(marked, count) + _log2_choose(others - marked, degree - count)
    out[low : high + 1] = terms - _log2_choose(others, degree) + math.log2(clients)
    return np.logaddexp2.accumulate(out[::-1])[::-1]


def log2_disconnected(clients: int, missing: int, degree: int) -> float:
    """log2 of the bound that the circle without ``missing`` clients falls apart; ``-inf`` where it can't."""
    if missing < degree:
        return -math.inf
    windows = _log2_choose(missing, degree) - _log2_choose(clients, degree)  # prod_{j<k} (missing - j)/(n - j)
    return math.log2(clients * (clients - 1) / 2) + float(windows)


def _log2_choose(n: int, k: int | np.ndarray) -> np.ndarray:
    table = _log2_factorials(1 << n.bit_length())
    return table[n] - table[k] - table[n - np.asarray(k)]


@lru_cache(maxsize=32)
def _log2_factorials(size: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.log2(np.arange(1, size + 1)))])
