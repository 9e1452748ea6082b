"""The slow twin of adapters of factors: the plain base with each weight replaced by ``W0 + change``, dense, no PEFT.

A client's change is ``s_i B_i A_i`` or ``s_i B_i R_i A_i`` of its own leading block, built here as a matrix; its loss
is the mean of its samples', each by itself at its own length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from clients.adapters.lora import Factors
from clients.adapters.space import Space
from clients.cohort import Cohort
from clients.data.batch import Batch
from tests.oracles.models import tiny

PREFIX = "base_model.model."


def build(family: str, adapter: Factors, dtype: torch.dtype = torch.float64, **model) -> Cohort:
    """A cohort over ``tiny(family, **model)`` that knows the adapter's space."""
    base, targets = tiny(family, dtype=dtype, **model)
    attached = adapter.attach(base, targets, seed=1)
    attached = attached.double() if dtype == torch.float64 else attached
    return Cohort(attached, base.task, space=adapter.space(attached))


def vector(cohort: Cohort, seed: int = 3) -> np.ndarray:
    """A server's vector ``(d,)`` float64 near the initial one, with nothing at a special point such as B = 0."""
    noise = np.random.default_rng(seed).normal(size=cohort.space.layout.size)
    return cohort.initial.double().numpy() + 0.1 * noise


def own(adapter: Factors, space: Space, server: np.ndarray, client: int) -> dict[str, Tensor]:
    """The client's tensors, cut and scaled by hand: ``A[:r]``, ``B[:, :r] s/s_i`` or ``R[:r, :r] s/s_i``."""
    views = {k: v.clone() for k, v in space.layout.views(torch.from_numpy(server)).items()}
    turn = client % len(adapter.ranks)
    rank, scale = adapter.ranks[turn], adapter.scalings[turn]
    for module in space.modules:
        views[module.a], views[module.b] = views[module.a][:rank], views[module.b][:, :rank]
        if module.core is not None:
            views[module.core] = views[module.core][(slice(rank),) * views[module.core].dim()]
        last = module.core or module.b
        views[last] = views[last] * (module.scale / scale)
    return views


def change(space: Space, tensors: Mapping[str, Tensor], scale: float | None = None) -> dict[str, Tensor]:
    """``s B A``, ``s B R A`` or ``s B diag(g) A`` of each module as a matrix; ``scale`` None: the module's own."""
    out = {}
    for module in space.modules:
        left = tensors[module.b]
        if module.core is not None:
            core = tensors[module.core]
            left = left @ (core if core.dim() == 2 else torch.diag(core))
        out[module.name] = (module.scale if scale is None else scale) * left @ tensors[module.a]
    return out


def logits(base: nn.Module, changes: Mapping[str, Tensor], head: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """The plain ``base`` on ``ids`` ``(n, T)``, all real tokens, with changed weights and head."""
    weights = {}
    for name, delta in changes.items():
        layer = base.get_submodule(name.removeprefix(PREFIX))
        weights[name.removeprefix(PREFIX) + ".weight"] = layer.weight + (
            delta.T if isinstance(layer, Conv1D) else delta
        )
    for name, value in head.items():
        weights[name.removeprefix(PREFIX).replace("modules_to_save.default.", "")] = value
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return functional_call(base, weights, (), given).logits


def loss(
    base: nn.Module, space: Space, tensors: Mapping[str, Tensor], batch: Batch, scale: float | None = None,
    more: Mapping[str, Tensor] | None = None, rows: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Mean loss of the samples ``rows`` (None: all) under a client's ``tensors``, with ``more`` added to the base."""
    changes = change(space, tensors, scale)
    for name, matrix in (more or {}).items():
        changes[name] = changes[name] + matrix
    head = {n: tensors[n] for n in tensors if n not in space.of_tensor}
    losses = []
    for row in range(len(batch)) if rows is None else rows:
        length = int(batch.attention_mask[row].sum())
        out = logits(base, changes, head, batch.input_ids[row : row + 1, :length])
        if batch.labels.dim() == 1:
            losses.append(F.cross_entropy(out, batch.labels[row : row + 1]))
        else:
            losses.append(F.cross_entropy(out[0, :-1], batch.labels[row, 1:length]))
    return torch.stack(losses).mean()


def gradients(
    base: nn.Module, space: Space, tensors: Mapping[str, Tensor], groups: Sequence[str], batch: Batch, **more
) -> dict[str, Tensor]:
    """The gradient of `loss` with respect to the tensors of ``groups``, by name."""
    wanted = [n for n, g in zip(space.layout.names, space.groups, strict=True) if g in groups]
    leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in tensors.items()}
    found = torch.autograd.grad(loss(base, space, leaves, batch, **more), [leaves[n] for n in wanted])
    return dict(zip(wanted, found, strict=True))


def train(
    base: nn.Module, space: Space, tensors: Mapping[str, Tensor], groups: Sequence[str], batches: Sequence[Batch],
    lr: float, weight_decay: float = 0.01, **more,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of ``groups`` after a step of AdamW for each of ``batches``, by name."""
    wanted = [n for n, g in zip(space.layout.names, space.groups, strict=True) if g in groups]
    leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in tensors.items()}
    optimizer = torch.optim.AdamW([leaves[n] for n in wanted], lr=lr, weight_decay=weight_decay)
    for batch in batches:
        optimizer.zero_grad()
        loss(base, space, leaves, batch, **more).backward()
        optimizer.step()
    return {n: leaves[n].detach() for n in wanted}
