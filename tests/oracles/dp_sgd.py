"""Slow twins of DP-SGD in the cohort: Opacus on one client's plain PEFT model, and a loop over batches of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer
from torch import Tensor, nn

from clients.adapters.base import Adapter
from clients.cohort import Cohort, causal_loss, classification_loss
from clients.data.batch import Batch
from clients.layout import Layout
from tests.oracles.cohorts import expect
from tests.oracles.models import tiny


class Opacus:
    """One client: PEFT's model in `GradSampleModule`, a torch optimiser in `DPOptimizer` (or its per-layer form).

    The adapter's tensors start as ``whole``; those of ``names`` train.
    ``clip`` is C, of which every tensor gets ``C / sqrt(K)`` where ``per_layer``. Losses are summed over the samples,
    so that a sample's gradient is that of its own loss, and the divisor is the expected batch.
    """

    def __init__(
        self,
        family: str,
        adapter: Adapter,
        whole: Mapping[str, Tensor],
        names: Sequence[str],
        clip: float,
        noise: float,
        expected: int,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=1.0),
        per_layer: bool = False,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ):
        base, targets = tiny(family, dtype=dtype)
        self.task, model = base.task, adapter.attach(base, targets, seed=1).to(dtype)
        for name, parameter in model.named_parameters():
            if name in whole:
                parameter.data.copy_(whole[name])
            parameter.requires_grad_(name in names)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert list(self.parameters) == list(names)
        self.layout = Layout.of(self.parameters)
        self.module = GradSampleModule(model.train(), strict=False, loss_reduction="sum")
        common = {"noise_multiplier": noise, "expected_batch_size": expected, "loss_reduction": "mean"}
        common["generator"] = torch.Generator().manual_seed(seed)
        inner = optimizer(list(self.parameters.values()))
        if per_layer:
            each = [clip / math.sqrt(len(names))] * len(names)
            self.optimizer: DPOptimizer = DPPerLayerOptimizer(inner, max_grad_norm=each, **common)
        else:
            self.optimizer = DPOptimizer(inner, max_grad_norm=clip, **common)

    def load(self, state: Tensor) -> None:
        with torch.no_grad():
            for name, value in self.layout.views(state).items():
                self.parameters[name].copy_(value)

    def step(self, batch: Batch | None) -> Tensor:
        """One step on ``batch`` (None: Poisson sampling drew nothing); the gradient that the optimiser saw ``(d,)``."""
        self.optimizer.zero_grad()
        if batch is None:
            for p in self.parameters.values():
                p.grad_sample = p.new_zeros(0, *p.shape)  # type: ignore[attr-defined]
        else:
            logits = self.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            loss = classification_loss if self.task == "classification" else causal_loss
            loss(logits[None], batch.labels[None]).sum().backward()
            # Where no hook fires Opacus would step on whole batches.
            assert all(len(p.grad_sample) == len(batch) for p in self.parameters.values())  # type: ignore[attr-defined]
        self.optimizer.step()
        return self.layout.flatten({n: p.grad for n, p in self.parameters.items()})  # type: ignore[misc]

    def state(self) -> Tensor:
        return self.layout.flatten({n: p.detach() for n, p in self.parameters.items()})


def samples_alone(cohort: Cohort, state: Tensor, batch: Batch) -> Tensor:
    """``(n, d)``: each sample's gradient by a batch of one through the plain PEFT model."""
    return torch.stack([expect(cohort, state, batch, [row])[1] for row in range(len(batch))])


def clipped_sum(samples: Tensor, layout: Layout, clip: float, groups: Sequence[Sequence[str]]) -> Tensor:
    """``(d,)``: each group's part of each row cut to ``C / sqrt(K)``, one row and one group at a time, summed."""
    total = torch.zeros(layout.size, dtype=samples.dtype)
    for sample in samples:
        for names in groups:
            columns = layout.columns(names)
            part = sample[columns]
            total[columns] += part / max(1.0, float(part.norm()) * math.sqrt(len(groups)) / clip)
    return total
