"""Local training: some optimiser steps from the start state. The loop that the local algorithms share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clients.adapters.base_change import Change
from clients.cohort import Cohort, CohortBatch
from clients.local import private
from clients.local.optimizers import AdamW, Optimizer
from fl.config import setting
from fl.errors import ConfigError, ShoalError
from fl.keys import generator

Memory = dict[str, np.ndarray]
CLIP = "clip"  # the memory's name for a clipping norm that adapts


@dataclass
class Work:
    """One client's job: from ``start`` ``(d,)``, train on the examples of ``batches`` (one array of indices a step).

    ``round`` is the round (or version) that the job belongs to; ``memory`` is what the client kept from its last job.
    Only the tensors of ``groups`` train (None: all); ``base`` is added to the base's own weights. Jobs are trained
    together only if their ``shared`` is equal: it names the version of what does not train. ``private`` says how
    gradients are clipped and noised (None: not at all).
    """

    client: int
    round: int
    start: np.ndarray
    batches: list[np.ndarray]
    lr: float
    memory: Memory = field(default_factory=dict)
    groups: tuple[str, ...] | None = None
    base: Change | int = 0  # a number names one that the worker holds (`Worker.hold`); 0 is no change
    shared: tuple[int, ...] = ()
    private: private.Private | None = None


@dataclass
class Fit:
    """What a job gives: the new state ``(n,)`` of the tensors that trained, whole, the mean loss over its steps, the
    work done, the memory to keep. ``sent`` ``(n,)`` is what the client sends, where that is not its change of state;
    ``audit`` ``(steps, k)`` is what the canaries of an audited job saw (`clients.local.private.Canaries`)."""

    client: int
    state: np.ndarray
    loss: float
    steps: int
    tokens: int
    memory: Memory = field(default_factory=dict)
    sent: np.ndarray | None = None
    audit: np.ndarray | None = None


# Builds the cohort's batch of one step for the slots that are still active: (slot indices, step) -> batch.
MakeBatch = Callable[[Sequence[int], int], CohortBatch]


@dataclass(frozen=True)
class LocalTraining:
    """Minibatch training with any optimiser (FedAvg's client: McMahan et al., arXiv 1602.05629, algorithm 1).

    ``epochs``, where given, replaces ``steps``. Each epoch visits the client's examples in a new order, drawn
    from the key (seed, "batches", client, round); the last batch of an epoch may be short.
    """

    steps: int | None = setting(None, ge=1, help="local steps a round")
    epochs: float | None = setting(None, gt=0, help="passes over the client's data a round, instead of steps")
    lr: float = setting(1e-3, gt=0, help="learning rate of the client")
    batch_size: int = setting(16, ge=1, help="examples a step")
    clip_norm: float | None = setting(None, gt=0, help="largest L2 norm of a client's gradient; null: no clipping")
    accumulation: int = setting(1, ge=1, help="parts that a batch is split in, to save memory")
    lr_schedule: str = setting("constant", choices=["constant", "cosine", "linear", "step"], help="over the rounds")
    lr_warmup_rounds: int = setting(0, ge=0, help="rounds of linear warm-up")
    lr_final: float = setting(0.0, ge=0, le=1, help="share of lr reached after the last round (cosine, linear)")
    lr_step_rounds: int = setting(10, ge=1, help="rounds between decays (step)")
    lr_gamma: float = setting(0.5, gt=0, le=1, help="factor of a decay (step)")
    optimizer: Optimizer = setting(AdamW(), help="what applies a gradient")

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            raise ConfigError("local.steps", None, "local.steps or local.epochs has to be given", "Try local.steps=5.")

    def num_steps(self, examples: int) -> int:
        """Optimiser steps of a client with that many examples: of whole epochs, then of a part of one."""
        if self.epochs is None:
            assert self.steps is not None
            return self.steps
        whole = math.floor(self.epochs + 1e-9)
        part = max(0.0, self.epochs - whole)
        epoch = math.ceil(examples / self.batch_size)
        return max(1, whole * epoch + math.ceil(part * examples / self.batch_size - 1e-9))

    def batches(self, seed: int, client: int, round: int, examples: np.ndarray) -> list[np.ndarray]:
        """The indices of each step's examples, from the key (seed, "batches", client, round)."""
        if len(examples) == 0:
            raise ShoalError(f"client {client} has no examples to train on; raise partition.min_size.")
        rng = generator(seed, "batches", client, round)
        steps = self.num_steps(len(examples))
        out: list[np.ndarray] = []
        while len(out) < steps:
            order = rng.permutation(examples)
            out += [order[low : low + self.batch_size] for low in range(0, len(order), self.batch_size)]
        return out[:steps]

    def lr_at(self, round: int, rounds: int) -> float:
        """Learning rate in ``round`` (from 1) of ``rounds``: warm-up, then the schedule.

        cosine: ``lr (f + (1-f) (1 + cos(pi x))/2)``, linear: ``lr (1 - (1-f) x)``, with ``f = lr_final`` and ``x`` the
        share of the rounds after the warm-up that are done before this one, so that the last still moves; step:
        ``lr gamma^floor((round-1)/lr_step_rounds)``.
        """
        if round <= self.lr_warmup_rounds:
            return self.lr * round / (self.lr_warmup_rounds + 1)
        x = min(1.0, (round - 1 - self.lr_warmup_rounds) / max(1, rounds - self.lr_warmup_rounds))
        if self.lr_schedule == "cosine":
            return self.lr * (self.lr_final + (1 - self.lr_final) * (1 + math.cos(math.pi * x)) / 2)
        if self.lr_schedule == "linear":
            return self.lr * (1 - (1 - self.lr_final) * x)
        if self.lr_schedule == "step":
            return self.lr * self.lr_gamma ** ((round - 1) // self.lr_step_rounds)
        return self.lr

    def gradient(
        self, cohort: Cohort, params: Tensor, batch: CohortBatch, works: Sequence[Work], step: int
    ) -> tuple[Tensor, Tensor]:
        """Losses ``(S,)`` and gradients ``(S, d)`` of one step: where an algorithm evaluates them is its own affair.

        ``works`` are the slots' jobs; ``step`` counts from 0. Whatever is drawn comes from a key that names these.
        """
        return private.gradients(cohort, params, batch, works, step, self.accumulation)

    def direction(self, params: Tensor, grads: Tensor, start: Tensor, cohort: Cohort) -> Tensor:
        """What the optimiser sees, from the gradient; all ``(S, d)`` in ``cohort.layout``. Algorithms change this."""
        return grads

    def after_step(self, params: Tensor, lr: Tensor, cohort: Cohort) -> None:
        """Change ``params`` ``(S, d)`` in place after an optimiser step: a proximal step, a projection."""

    def check(self, adapter: Any) -> None:
        """Raise `ConfigError` where this algorithm can't train ``adapter`` (`clients.adapters.base.Adapter`)."""

    def fit(self, cohort: Cohort, works: Sequence[Work], make_batch: MakeBatch) -> list[Fit]:
        """Train one cohort: ``works`` in order of falling number of steps, so that the active slots are a prefix.

        A slot whose steps are done leaves the pass; its state is not touched again.
        """
        counts = [len(w.batches) for w in works]
        if counts != sorted(counts, reverse=True):
            raise ValueError("a cohort's jobs go in order of falling number of steps")
        start = torch.from_numpy(np.stack([w.start for w in works]).astype(np.float32, copy=False)).to(cohort.device)
        params = start.clone()
        state = self.optimizer.init(params)
        lr = torch.tensor([[w.lr] for w in works], dtype=params.dtype, device=params.device)
        losses = torch.zeros(len(works), dtype=torch.float64, device=params.device)
        tokens = [0] * len(works)
        for step in range(counts[0]):
            active = sum(c > step for c in counts)
            batch = make_batch(range(active), step)
            now = params[:active]
            loss, grads = self.gradient(cohort, now, batch, works[:active], step)
            grads = self.direction(now, grads, start[:active], cohort)
            if self.clip_norm is not None:
                grads = clip_rows(grads, self.clip_norm)
            self.optimizer.step(now, grads, {k: v[:active] for k, v in state.items()}, step + 1, lr[:active])
            self.after_step(now, lr[:active], cohort)
            losses[:active] += loss
            real = (batch.attention_mask.sum(-1) * (batch.weights > 0)).sum(1).tolist()
            for slot in range(active):
                tokens[slot] += int(real[slot])
        mean = (losses.cpu() / torch.tensor(counts, dtype=torch.float64)).tolist()
        final = params.cpu().numpy()
        return [
            Fit(w.client, final[s].copy(), mean[s], counts[s], tokens[s], kept(w), audit=audited(w))
            for s, w in enumerate(works)
        ]


def kept(work: Work) -> Memory:
    """What the client keeps of a job: what it kept before and, where clipping adapts, the norm it has come to."""
    if work.private is None or work.private.adaptive is None:
        return work.memory
    return work.memory | {CLIP: np.array([work.private.clip])}


def audited(work: Work) -> np.ndarray | None:
    """What the canaries of an audited job saw, a row for each step."""
    canaries = None if work.private is None else work.private.canaries
    return None if canaries is None else np.stack(canaries.seen)


def clip_rows(grads: Tensor, clip_norm: float) -> Tensor:
    """Each row scaled to L2 norm at most C: ``g min(1, C / (|g| + 1e-6))``, as torch's ``clip_grad_norm_``."""
    norms = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
    return grads * (clip_norm / (norms + 1e-6)).clamp(max=1.0)
