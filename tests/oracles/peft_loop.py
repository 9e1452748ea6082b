"""The slow twin of the cohort: one client at a time, one plain PEFT model, gradients by ``backward``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.data.batch import Batch
from clients.layout import Layout


def load(model: nn.Module, layout: Layout, state: Tensor) -> None:
    """Put the flat ``state`` into the model's trainable tensors."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in layout.views(state).items():
            parameters[name].copy_(value)


def sample_loss(model: nn.Module, batch: Batch, row: int) -> Tensor:
    """The loss of one sample by itself, at its own length: a batch of one, no padding."""
    length = int(batch.attention_mask[row].sum())
    ids = batch.input_ids[row : row + 1, :length]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    if batch.labels.dim() == 1:
        return F.cross_entropy(logits, batch.labels[row : row + 1])
    return F.cross_entropy(logits[0, :-1], batch.labels[row, 1:length])


def gradient(model: nn.Module, layout: Layout, state: Tensor, batch: Batch, rows: list[int]) -> tuple[float, Tensor]:
    """Mean loss of the samples ``rows`` and its gradient ``(d,)``, sample by sample."""
    load(model, layout, state)
    model.zero_grad()
    loss = torch.stack([sample_loss(model, batch, row) for row in rows]).mean()
    loss.backward()
    parameters = dict(model.named_parameters())
    grads = {
        n: parameters[n].grad if parameters[n].grad is not None else torch.zeros_like(parameters[n])
        for n in layout.names
    }
    return loss.item(), layout.flatten(grads)  # type: ignore[arg-type]
