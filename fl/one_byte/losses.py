"""The losses of samples under many states, without gradients and without dropout.

Where a linear head is all that trains, the network below it gives each sample the same features under every state:
they are computed once, and a loss is a product with the head's weights, in float64. Otherwise each state takes a
forward pass, in the worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import log_softmax

from clients.heads import features, linear_head
from clients.trainer import Trainer
from fl.errors import ConfigError

# (states, examples) -> the losses of the i-th examples under the i-th state ``(d,)``: (len(examples[i]),) float64
Losses = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], list[np.ndarray]]
_BATCH = 32


def losses_of(trainer: Trainer) -> Losses:
    """The losses of training samples of ``trainer``'s model."""
    try:
        return OfHead(trainer)
    except ConfigError:  # something else trains, or the head is no linear one
        return OfModel(trainer)


class OfModel:
    """By forward passes."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def __call__(self, states: Sequence[np.ndarray], examples: Sequence[np.ndarray]) -> list[np.ndarray]:
        tasks = [("evaluate", (state, "train", own)) for state, own in zip(states, examples, strict=True)]
        return [score.loss / score.targets for score in self.trainer._run(tasks)]


class OfHead:
    """From features that are computed once. Raises `ConfigError` where there are none."""

    def __init__(self, trainer: Trainer):
        self.worker = trainer.worker
        cohort, train = self.worker.cohort, self.worker.sets["train"]
        head, spans = linear_head(cohort), cohort.space.spans
        self.weight = slice(*spans[head.names[head.weight_name]])
        self.bias = None if head.bias_name is None else slice(*spans[head.names[head.bias_name]])
        self.shape = cohort.space.shape(head.names[head.weight_name])
        self.labels = np.asarray(train.labels).astype(np.int64)
        # All at once, in batches of like length that depend on the data alone: so a run that goes on has the same bits.
        order = np.argsort(np.asarray(train.lengths), kind="stable")
        self.rows = np.zeros((len(order), self.shape[1]))
        for low in range(0, len(order), _BATCH):
            part = order[low : low + _BATCH]
            self.rows[part] = features(cohort, self.worker._batch("train", [part], None))

    def __call__(self, states: Sequence[np.ndarray], examples: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._one(state.astype(np.float64), own) for state, own in zip(states, examples, strict=True)]

    def _one(self, state: np.ndarray, examples: np.ndarray) -> np.ndarray:
        logits = self.rows[examples] @ state[self.weight].reshape(self.shape).T
        if self.bias is not None:
            logits += state[self.bias]
        return -log_softmax(logits, axis=1)[np.arange(len(examples)), self.labels[examples]]
