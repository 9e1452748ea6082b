"""Faults planted in the code that makes gradients private, one function each; a test patches them in."""

import numpy as np
import torch

from clients.local import private

FAULTS = ("noise dropped", "noise a tenth", "clipped as a batch", "a step without noise")
_normal, _group_norms, _gradients = private._normal, private.group_norms, private.gradients


def plant(patch, fault: str, expected: float = 0.0) -> None:
    """Break `clients.local.private`; ``expected`` is the public batch size."""
    if fault == "noise dropped":
        patch.setattr(private, "_normal", lambda like, *key: torch.zeros_like(like))
    elif fault == "noise a tenth":
        patch.setattr(private, "_normal", lambda like, *key: 0.1 * _normal(like, *key))
    elif fault == "a step without noise":  # the key ends with round, attempt, step, "gradient"
        patch.setattr(private, "_normal", lambda like, *key: _normal(like, *key) * (key[-4:-1] != (1, 0, 2)))
    elif fault == "clipped as a batch":
        patch.setattr(private, "group_norms", lambda grads, groups: _batch_norms(grads, groups, expected))
    elif fault == "empty batches skipped":
        patch.setattr(private, "gradients", _skipping)
    else:
        assert not fault


def _batch_norms(grads, groups, expected):
    """The norm of the mean gradient for every sample: the mean is clipped, not each sample."""
    mean = {name: grad.sum(0, keepdim=True) / expected for name, grad in grads.items()}
    return _group_norms(mean, groups).expand(len(next(iter(grads.values()))), -1)


def _skipping(cohort, params, batch, works, step, parts=1):
    losses, grads = _gradients(cohort, params, batch, works, step, parts)
    for slot, work in enumerate(works):
        canaries = work.private.canaries
        if batch.counts[slot] == 0 and (canaries is None or len(canaries.taken[step]) == 0):
            grads[slot] = 0.0
    return losses, grads


def server(guard, fault: str) -> None:
    """Break a `privacy.client_level.ServerGuard`."""
    noise, counted, clip = guard.noise, guard.counted, guard.clip
    if fault == "noise dropped":
        guard.noise = lambda size, *key: np.zeros(size)
    elif fault == "noise a tenth":
        guard.noise = lambda *key: 0.1 * noise(*key)
    elif fault == "a step without noise":
        guard.noise = lambda size, round, digest: noise(size, round, digest) * (round != 5)
    elif fault == "clipped as a batch":

        def together(updates, round):
            """The mean is brought to norm C; what each client added to it is not bounded any more."""
            from dataclasses import replace

            kept = counted(updates, round)
            norm = np.linalg.norm(sum(u.vector for u in kept)) / guard.divisor
            # `guard.clip` bounds single updates; it is out of the way here, and back for the noise's scale.
            guard.clip = np.inf
            return [replace(u, vector=u.vector * min(1.0, clip / norm)) for u in kept]

        def scaled(*key):
            guard.clip = clip
            return noise(*key)

        guard.counted, guard.noise = together, scaled
    else:
        assert not fault
