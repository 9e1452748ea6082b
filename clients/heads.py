"""Softmax regression on frozen features: a convex objective with its exact gradient and curvature, in float64.

With ``h_j`` ``(k,)`` the input of a linear head W ``(c, k)``, b ``(c,)`` for sample j of m, and y_j its label::

    f(W, b) = (1/m) sum_j -log softmax(W h_j + b)_{y_j} + l2/2 ||(W, b)||^2

f is l2-strongly convex. The Hessian of cross-entropy in the logits, ``diag(p) - p p^T``, is at most 1/2, so f is
L-smooth with ``L = 1/2 lambda_max((1/m) sum_j [h_j; 1][h_j; 1]^T) + l2`` (Boehning, 1992), a bound and no estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import log_softmax
from torch import nn

from clients.cohort import Cohort, CohortBatch
from clients.stacked import StackedLinear
from fl.errors import ConfigError


@dataclass(frozen=True, eq=False)
class SoftmaxHead:
    """One holder's objective. ``features`` ``(m, k)`` float64, ``labels`` ``(m,)``; a point is ``(d,)``: W, then b."""

    features: np.ndarray
    labels: np.ndarray
    classes: int
    l2: float
    bias: bool = True

    @property
    def size(self) -> int:
        """d."""
        return self.classes * (self.features.shape[1] + self.bias)

    def _log_probabilities(self, point: np.ndarray) -> np.ndarray:
        inputs = self.features.shape[1]
        weight = point[: self.classes * inputs].reshape(self.classes, inputs)
        logits = self.features @ weight.T
        return log_softmax(logits + point[self.classes * inputs :] if self.bias else logits, axis=1)

    def loss(self, point: np.ndarray) -> float:
        """f at ``point`` ``(d,)``."""
        own = self._log_probabilities(point)[np.arange(len(self.labels)), self.labels]
        return float(-own.mean() + self.l2 / 2 * (point @ point))

    def gradient(self, point: np.ndarray) -> np.ndarray:
        """The gradient of f at ``point``, ``(d,)``."""
        slope = np.exp(self._log_probabilities(point))
        slope[np.arange(len(self.labels)), self.labels] -= 1
        slope /= len(self.labels)
        parts = [(slope.T @ self.features).reshape(-1), *([slope.sum(0)] if self.bias else [])]
        return np.concatenate(parts) + self.l2 * point

    def smoothness(self) -> float:
        """L, by the bound above."""
        rows = self.features
        if self.bias:
            rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        # The spectrum of the smaller of the two products.
        moment = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
        return float(np.linalg.eigvalsh(moment)[-1] / len(rows) / 2 + self.l2)


def linear_head(cohort: Cohort) -> StackedLinear:
    """The one layer of ``cohort`` that trains. Raises `ConfigError` unless it is a linear head."""
    layers = [layer for _, _, layer in cohort.swaps]
    if len(layers) != 1 or not isinstance(layers[0], StackedLinear) or cohort.task != "classification":
        raise ConfigError(
            "adapter", "this model's", "one linear head alone, where the objective has to be convex",
            "Use adapter=head and a model with a linear head, such as model=minilm or model.pooling=mean.",
        )  # fmt: skip
    return layers[0]


def features(cohort: Cohort, batch: CohortBatch) -> np.ndarray:
    """The input of the linear head ``(samples, k)`` float64 for each sample of ``batch``, which has one slot.

    Takes a forward pass without dropout. Raises `ConfigError` for a head that sees more than one row a sample.
    """
    found: list[torch.Tensor] = []

    def keep(_layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0].detach())

    handle = linear_head(cohort).register_forward_pre_hook(keep)
    batch.keys = None
    try:
        with torch.no_grad():
            cohort.logits(cohort.layout.views(cohort.initial.to(cohort.device)[None]), batch)
    finally:
        handle.remove()
    if len(found) != 1 or found[0].dim() != 2:
        raise ConfigError("model", "this model's head", "one on a single vector for each sample (model.pooling=mean)")
    return found[0][: batch.counts[0]].double().cpu().numpy()
