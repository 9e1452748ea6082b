"""Peers whose losses are quadratics, in place of a model: ``l(theta; x_j) = |theta - x_j|^2 / 2`` of sample j."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clients.local.optimizers import SGD
from clients.local.training import LocalTraining
from fl.messages import MalformedMessage, PeerRequest, TrainReply
from fl.one_byte.log import Entry, Rule
from fl.one_byte.replicas import Replicas
from privacy.base import Guard

SIZE = 25


class Quadratics:
    """`fl.one_byte.losses.Losses` of these samples. Counts its evaluations."""

    def __init__(self, samples: np.ndarray):
        self.samples, self.evaluations = samples, 0

    def __call__(self, states: Sequence[np.ndarray], examples: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.evaluations += len(states)
        pairs = zip(states, examples, strict=True)
        return [0.5 * ((s.astype(np.float64) - self.samples[own]) ** 2).sum(1) for s, own in pairs]


def samples(peers: int, each: int = 12, seed: int = 0) -> np.ndarray:
    """``(peers each, SIZE)``: each peer's samples lie about a point of its own."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((peers, 1, SIZE))
    return (centres + 0.1 * rng.standard_normal((peers, each, SIZE))).reshape(-1, SIZE)


def node(peers: int, rounds: int = 20, directions: int = 2, guard: Guard | None = None, **rule: Any) -> Replicas:
    """The replicas of ``peers`` peers, each with twelve samples of its own."""
    points = samples(peers)
    parts = [np.arange(12 * p, 12 * (p + 1)) for p in range(peers)]
    local = LocalTraining(steps=directions, lr=0.1, batch_size=4, optimizer=SGD())
    agreed = Rule(**{"seed": 0, "columns": np.arange(SIZE), "lrs": [0.1] * rounds, **rule})
    lengths = np.ones(len(points), np.int64)
    return Replicas(Quadratics(points), lengths, SIZE, parts, local, guard or Guard(), agreed, 1e-2)


def ask(
    replicas: Replicas, peers: Sequence[int], log: Sequence[Entry], first: int = 1, start: np.ndarray | None = None,
    **asked: int,
) -> dict[int, TrainReply]:  # fmt: skip
    """What ``peers`` answer to the log so far, of which they are sent what follows round ``first`` - 1."""
    number = len(replicas.parts)
    packed = b"".join(entry.pack(number, replicas.rule.quantiser) for entry in log[first - 1 :])
    state = np.zeros(0, np.float32) if start is None else start
    requests = [
        PeerRequest(
            p, len(log) + 1, len(log), state, "layout", {"first": first, **asked},
            {"log": np.frombuffer(packed, np.uint8)},
        )
        for p in peers
    ]  # fmt: skip
    out = {}
    for p, reply in zip(peers, replicas.answer(requests), strict=True):
        if isinstance(reply, MalformedMessage):
            raise reply
        out[p] = reply
    return out


def go(replicas: Replicas, peers: Sequence[int], rounds: int, log: list[Entry] | None = None) -> list[Entry]:
    """Let ``peers`` go on for ``rounds`` rounds, and apply them all; the log."""
    log = [] if log is None else log
    for _ in range(rounds):
        first = 1 if not log else len(log)
        start = np.zeros(SIZE, np.float32) if not log else None
        answers = ask(replicas, peers, log, first, start, probe=1)
        log.append(Entry.of(len(log) + 1, {p: a.arrays["scalars"] for p, a in answers.items()}))
    ask(replicas, peers, log, len(log))
    return log
