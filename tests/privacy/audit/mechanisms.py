"""Small mechanisms with a known epsilon, and the same with a planted fault, for the audits' tests.

A DP-SGD-like run on Dirac canaries: canary i's raw gradient is `RAW` times the i-th coordinate vector, clipped to norm
1; the last `SPARE` coordinates belong to no canary. Poisson sampling at ``rate``, sums, noise of deviation ``noise``.
"""

from dataclasses import dataclass

import numpy as np
from opacus.accountants.analysis import rdp

RAW = 100.0  # far above the clip norm, so that what is clipped where makes a difference
SPARE = 64
FAULTS = ("noise dropped", "noise a tenth", "clipped as a batch", "a step without noise")


@dataclass(frozen=True)
class Run:
    noise: float = 5.0
    rate: float = 0.5
    steps: int = 20
    fault: str = ""

    def epsilon(self, delta: float) -> float:
        """The upper bound of the mechanism without the fault (Opacus' RDP accountant)."""
        orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 256))
        spent = rdp.compute_rdp(q=self.rate, noise_multiplier=self.noise, steps=self.steps, orders=orders)
        return rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)[0]

    def releases(self, present: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The ``(steps, canaries + SPARE)`` noisy sums of clipped gradients, for the canaries that are ``present``."""
        m = len(present)
        taken = (rng.random((self.steps, m)) < self.rate) & present
        sums = np.zeros((self.steps, m + SPARE))
        sums[:, :m] = taken  # RAW e_i, clipped to e_i
        deviation = np.full((self.steps, 1), self.noise)
        if self.fault == "noise dropped":
            deviation[:] = 0
        if self.fault == "noise a tenth":
            deviation /= 10
        if self.fault == "a step without noise":
            deviation[self.steps // 2] = 0
        if self.fault == "clipped as a batch":  # the mean gradient is clipped, and made a sum again
            batch = max(64.0, self.rate * m)  # the divisor is public: it does not shrink with the data
            mean = RAW * sums / batch
            sums = batch * mean / np.maximum(1, np.linalg.norm(mean, axis=1, keepdims=True))
        noisy = sums + deviation * rng.standard_normal(sums.shape)
        if self.fault == "empty batches skipped":
            noisy[~taken.any(axis=1)] = 0
        return noisy
