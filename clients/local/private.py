"""Differentially private gradients of a cohort: per-sample clipping and noise (DP-SGD).

For a client whose batch x_1, ..., x_n was drawn by Poisson sampling, with expected size m and per-sample gradients
``g_j`` over all tensors that train,

    g = (1/m) [ sum_j c_j g_j + N(0, (z C)^2 I) ],    c_j = min(1, C / |g_j|)

(Abadi et al., arXiv 1607.00133, algorithm 1). The divisor is the *expected* batch, which is public: the size of the
batch that was drawn is not. An empty batch gives noise alone. One sample more or less moves the sum by C at most.

Clipping by groups of tensors k = 1..K clips each group's part of ``g_j`` to ``C / sqrt(K)``, so the whole moves by C
all the same (McMahan et al., arXiv 1710.06963, section 3.1 "per-layer clipping").

Adaptive clipping (Andrew et al., arXiv 1905.03871, algorithm 1, at the level of samples) follows a quantile of the
gradients' norms: with ``b_j = 1`` where ``|g_j| <= C``,

    b = (1/m) [ sum_j (b_j - 1/2) + N(0, s_b^2) ] + 1/2,    C <- C exp(-eta (b - quantile))

and the gradient's noise is drawn for the C that clipped it. What both releases cost together is that of one release of
noise multiplier z if the gradient's own is ``(z^-2 - (2 s_b)^-2)^(-1/2)`` (their theorem 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clients.cohort import SAMPLE_SCALARS, Cohort, CohortBatch
from fl.keys import Part, generator, torch_generator

if TYPE_CHECKING:
    from clients.local.training import Work

CLIPPING = ("flat", "per_layer", "per_adapter")
RAW = 100.0  # length of a canary's gradient before clipping, in units of C


@dataclass(frozen=True)
class AdaptiveClip:
    """How the clipping norm follows the ``quantile`` of norms: ``rate`` is eta, ``noise`` is s_b (in samples)."""

    quantile: float
    rate: float
    noise: float


@dataclass
class Canaries:
    """Made-up samples of an audited job (`privacy.audit`): each has a gradient along a coordinate of its own.

    It is `RAW` times as long as C and passes what a sample's gradient passes. ``taken`` are the canaries in each step's
    batch, of ``number``; ``spare`` further coordinates belong to none; ``key`` names the draw of them all. `gradients`
    adds a row to ``seen`` in every step: what it released at the canaries' coordinates and then at the spare ones, in
    units of what one canary adds.
    """

    number: int
    spare: int
    taken: list[np.ndarray]
    key: tuple[Part, ...]
    seen: list[np.ndarray] = field(default_factory=list)

    def coordinates(self, own: np.ndarray) -> np.ndarray:
        """Those of the canaries and the spare ones, ``(number + spare,)``, among the columns ``own``."""
        return own[generator(*self.key, len(own)).choice(len(own), self.number + self.spare, replace=False)]


@dataclass
class Private:
    """What makes one client's job private.

    ``clip`` is C, ``noise`` the standard deviation of the gradient's noise in units of C (0: it is added elsewhere),
    ``expected`` m. ``key`` names the noise: (key, step). ``clipping`` is flat (one norm over all that trains),
    per_layer (each tensor by itself) or per_adapter (the tensors of an adapted layer together, the head's together).
    """

    clip: float
    noise: float
    expected: float
    key: tuple[Part, ...]
    clipping: str = "flat"
    adaptive: AdaptiveClip | None = None
    canaries: Canaries | None = None


def gradients(
    cohort: Cohort, params: Tensor, batch: CohortBatch, works: Sequence[Work], step: int, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """Losses ``(S,)`` and gradients ``(S, d)`` at ``params`` ``(S, d)``: private ones where the jobs are private.

    ``parts`` splits a batch to save memory. A private job's loss is the mean over its own samples, which is no
    release: it must not leave the client. Where clipping adapts, ``works`` get their new norm.
    """
    jobs = [w.private for w in works]
    first = jobs[0]
    if first is None:
        return cohort.gradients(params, batch, parts)
    own = [job for job in jobs if job is not None]
    if len(own) < len(jobs) or any(j.clipping != first.clipping for j in own):
        raise ValueError("a cohort's jobs are all private, in the same way, or none is")
    groups = clipping_groups(cohort, first.clipping)
    clip = params.new_tensor([job.clip for job in own])
    total = torch.zeros_like(params)
    sums = cohort.layout.views(total)
    losses = torch.zeros(len(own), dtype=torch.float64, device=params.device)
    within = torch.zeros_like(clip)  # samples whose norm is C at most, less half of all
    samples = itertools.chain(cohort.each_sample(params, batch, parts), _canaries(cohort, works, step, params))
    for slots, _, loss, grads in samples:
        norms = group_norms(grads, groups)  # (n, K)
        bound = clip[slots, None] / math.sqrt(len(groups))
        # A sample whose gradient is not finite counts for nothing: no clipping would bound it.
        finite = torch.isfinite(norms).all(1)
        some = not bool(finite.all())
        factors = (bound / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0) * finite[:, None]
        if some:
            factors = factors.nan_to_num()
        owner = torch.nn.functional.one_hot(slots, len(own)).to(params).T  # (S, n)
        for k, names in enumerate(groups):
            weight = owner * factors[:, k]
            for name in names:
                grad = grads[name].flatten(1)
                if some:
                    grad = torch.where(finite[:, None], grad, 0.0)
                sums[name] += (weight @ grad).reshape(sums[name].shape)
        losses.index_add_(0, slots, loss.double())
        within.index_add_(0, slots, ((norms <= bound).all(1) & finite).to(params) - 0.5)
    for slot, job in enumerate(own):
        if job.noise:
            total[slot] += job.noise * job.clip * _normal(params[slot], *job.key, step, "gradient")
        total[slot] /= job.expected
        if job.adaptive is not None:
            job.clip = _next_clip(job, float(within[slot]), step)
    _own_columns(cohort, works, total)
    for slot, (work, job) in enumerate(zip(works, own, strict=True)):
        if job.canaries is not None:
            one = clip[slot] / math.sqrt(len(groups)) / job.expected
            where = torch.from_numpy(job.canaries.coordinates(_owned(cohort, work.client)))
            job.canaries.seen.append((total[slot].cpu()[where] / one.cpu()).numpy())
    counts = torch.tensor(batch.counts, dtype=torch.float64, device=params.device).clamp(min=1)
    return losses / counts, total


def clipping_groups(cohort: Cohort, clipping: str) -> list[list[str]]:
    """The tensors that are clipped together: names of ``cohort.layout``, each in one group."""
    names = list(cohort.layout.names)
    if clipping == "flat":
        return [names]
    if clipping == "per_layer":
        return [[name] for name in names]
    owner: dict[str, int] = {}
    for place, (_, _, layer) in enumerate(cohort.swaps):
        for name in layer.names.values():
            owner.setdefault(name, place)  # a tensor that layers share is the first one's
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(owner[name], []).append(name)
    return list(groups.values())


def group_norms(grads: dict[str, Tensor], groups: Sequence[Sequence[str]]) -> Tensor:
    """``(n, K)``: the L2 norm of each sample's gradient over each group of tensors."""
    squares = [sum(torch.linalg.vector_norm(grads[name].flatten(1), dim=1) ** 2 for name in names) for names in groups]
    return torch.stack([torch.as_tensor(s) for s in squares], dim=1).sqrt()


def _normal(like: Tensor, *key: Part) -> Tensor:
    generator = torch_generator(*key, device=like.device.type)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _next_clip(job: Private, within: float, step: int) -> float:
    """The norm of the next step, from the noisy share of samples that were within this one's."""
    assert job.adaptive is not None
    noise = float(torch.randn((), generator=torch_generator(*job.key, step, "clip"), dtype=torch.float64))
    share = (within + job.adaptive.noise * noise) / job.expected + 0.5
    return job.clip * math.exp(-job.adaptive.rate * (share - job.adaptive.quantile))


def _canaries(
    cohort: Cohort, works: Sequence[Work], step: int, params: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
    """The canaries in this step's batches, as `Cohort.each_sample` yields samples; their loss is 0."""
    most = max(1, SAMPLE_SCALARS // max(1, cohort.layout.size))
    for slot, work in enumerate(works):
        job = work.private
        if job is None or job.canaries is None:
            continue
        where = job.canaries.coordinates(_owned(cohort, work.client))
        lengths = np.full(job.canaries.number, RAW * job.clip)
        if job.adaptive is not None:
            lengths[::2] = 0.99 * job.clip  # half of them within C: their count leaves it where it is
        taken = job.canaries.taken[step]
        for part in (taken[low : low + most] for low in range(0, len(taken), most)):
            flat = params.new_zeros(len(part), cohort.layout.size)
            flat[torch.arange(len(part)), torch.from_numpy(where[part])] = params.new_tensor(lengths[part])
            slots = torch.full((len(part),), slot, device=params.device)
            yield slots, torch.from_numpy(part), params.new_zeros(len(part)), cohort.layout.views(flat)


def _own_columns(cohort: Cohort, works: Sequence[Work], total: Tensor) -> None:
    """No noise where a client of a lower rank owns nothing: it would raise the client's rank."""
    if not cohort.space.mixed:
        return
    for slot, work in enumerate(works):
        mine = torch.zeros(cohort.layout.size, dtype=torch.bool)
        mine[torch.from_numpy(_owned(cohort, work.client))] = True
        total[slot] = torch.where(mine.to(total.device), total[slot], 0.0)


def _owned(cohort: Cohort, client: int) -> np.ndarray:
    """The columns of ``cohort.layout``, which holds what trains, that are the client's own: ``(n,)``, rising."""
    if not cohort.space.mixed:
        return np.arange(cohort.layout.size)
    spans, mask = cohort.space.spans, np.zeros(cohort.space.layout.size, dtype=bool)
    mask[cohort.space.columns(None, client)] = True
    return np.flatnonzero(np.concatenate([mask[slice(*spans[name])] for name in cohort.layout.names]))
