"""Two losses along a direction, and the scalar that they make: zeroth-order probes of many peers at once.

For peer k at state theta, its s-th minibatch x_1, ..., x_m and the direction z(t, k, s) of the numbers that train::

    d_j = (l(theta + eps z; x_j) - l(theta - eps z; x_j)) / (2 eps),        g = mean_j d_j

(MeZO, arXiv 2305.17333, algorithm 1; SPSA). Both states are made from theta itself: adding eps z, then taking 2 eps z
away and adding eps z again would leave rounding errors in theta, other ones at every peer. Dropout is off.

A private probe clips each sample and adds noise to the sum, before it is quantised (DPZero, arXiv 2310.09639)::

    g = (1 / m) [ sum_j clip(d_j, -C, C) + N(0, (z C)^2) ]

with m the expected size of a Poisson batch. One sample more or less moves the sum by C at most, whatever the number of
parameters, so that the noise is one number's. DPZero's code has 2 C: there a sample is replaced by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clients.local.private import Private
from fl.keys import generator
from fl.one_byte.directions import direction
from fl.one_byte.losses import Losses

HELD = 1 << 25  # scalars of perturbed states that are held at a time: 128 MiB


@dataclass(frozen=True, eq=False)
class Probe:
    """What ``peer`` probes in ``round``: at ``state`` ``(d,)``, along a direction for each of its ``batches``."""

    peer: int
    round: int
    state: np.ndarray
    batches: list[np.ndarray]
    private: Private | None = None


@dataclass(frozen=True, eq=False)
class Probed:
    """The scalars ``(S,)`` float64 of a probe, and the mean of its samples' losses (NaN: there was no sample)."""

    scalars: np.ndarray
    loss: float


def probe(losses: Losses, probes: Sequence[Probe], columns: np.ndarray, eps: float, seed: int) -> list[Probed]:
    """The scalars of ``probes``, whose directions move the ``columns`` of their states."""
    tasks = [(i, s) for i, p in enumerate(probes) for s in range(len(p.batches))]
    most = max(1, HELD // (2 * max((len(p.state) for p in probes), default=1)))
    found: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for low in range(0, len(tasks), most):
        part = [(i, s) for i, s in tasks[low : low + most] if len(probes[i].batches[s])]
        states, examples = [], []
        for i, s in part:
            p = probes[i]
            move = np.float32(eps) * direction(len(columns), seed, p.round, p.peer, s)
            for sign in (1, -1):
                state = p.state.copy()
                state[columns] += sign * move
                states.append(state)
                examples.append(p.batches[s])
        seen = losses(states, examples)
        found |= {task: (seen[2 * n], seen[2 * n + 1]) for n, task in enumerate(part)}
    nothing = np.zeros(0), np.zeros(0)
    return [_probed(p, [found.get((i, s), nothing) for s in range(len(p.batches))], eps) for i, p in enumerate(probes)]


def _probed(probe: Probe, pairs: Sequence[tuple[np.ndarray, np.ndarray]], eps: float) -> Probed:
    scalars = np.zeros(len(pairs))
    for s, (plus, minus) in enumerate(pairs):
        slopes = (plus - minus) / (2 * eps)
        scalars[s] = slopes.mean() if probe.private is None else private_mean(slopes, probe.private, s)
    seen = [loss for pair in pairs for side in pair for loss in side]
    return Probed(scalars, float(np.mean(seen)) if seen else float("nan"))


def private_mean(slopes: np.ndarray, job: Private, sample: int) -> float:
    """The noisy mean of the samples' ``slopes`` ``(m,)``; one that is not finite counts for nothing."""
    kept = np.clip(np.where(np.isfinite(slopes), slopes, 0.0), -job.clip, job.clip).sum()
    noise = job.noise * job.clip * generator(*job.key, sample, "scalar").standard_normal()
    return float(kept + noise) / job.expected
