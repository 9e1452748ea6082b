"""One process's share of the work: a cohort, the data, and the local algorithm. Trains one cohort at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from clients.adapters import statistics
from clients.adapters.base_change import Change
from clients.cohort import Cohort, CohortBatch, causal_loss, classification_loss
from clients.data.tokens import TokenData
from clients.local.training import Fit, LocalTraining, Work
from clients.prefix import PrefixCache


@dataclass
class Scores:
    """What evaluation gives for each example: the summed loss, how many targets it is over, and the predicted class.

    For classification ``targets`` is 1; for a causal language model it is the example's target tokens and ``predicted``
    is -1.
    """

    loss: np.ndarray  # (n,) float64
    targets: np.ndarray  # (n,) int64
    predicted: np.ndarray  # (n,) int64


class Worker:
    """Trains and evaluates on the examples of ``sets`` (named `TokenData`), with one `Cohort`.

    ``prefix`` is the filled cache of the frozen layers' activations of all sets, or None.
    """

    def __init__(
        self,
        cohort: Cohort,
        sets: dict[str, TokenData],
        local: LocalTraining,
        seed: int,
        prefix: PrefixCache | None = None,
    ):
        self.cohort, self.sets, self.local, self.seed = cohort, sets, local, seed
        self.prefix = prefix
        self.bases: dict[int, Change] = {0: {}}
        self._loaded = 0

    def hold(self, number: int, change: Change, forget: Sequence[int] = ()) -> None:
        """Keep ``change`` of the base under ``number`` (0 is no change), in place of those numbered ``forget``."""
        self.bases[number] = change
        for old in forget:
            self.bases.pop(old, None)

    def _use(self, base: int) -> None:
        if base != self._loaded:
            self.cohort.load_base(self.bases[base])
            self._loaded = base

    def _batch(self, name: str, examples: Sequence[np.ndarray], keys: list | None) -> CohortBatch:
        data = self.sets[name]
        batch = CohortBatch.of([data.batch(e) for e in examples], keys, self.cohort.device, data.pad_id)
        return batch if self.prefix is None else self.prefix.lay(name, batch, examples)

    def fit(self, works: Sequence[Work]) -> list[Fit]:
        """Train one cohort; ``works`` in order of falling number of steps, all of one base, groups and ``shared``."""

        def make_batch(active: Sequence[int], step: int) -> CohortBatch:
            keys = None
            if self.cohort.has_dropout:
                keys = [(self.seed, works[s].client, works[s].round, step) for s in active]
            return self._batch("train", [works[s].batches[step] for s in active], keys)

        first = works[0]
        assert isinstance(first.base, int)
        self._use(first.base)
        space = self.cohort.space
        columns = space.columns(first.groups)
        start = torch.tensor(first.start, dtype=torch.float32)
        with self.cohort.training(first.groups or space.names, start, [w.client for w in works]):
            mine = works if len(columns) == len(start) else [replace(w, start=w.start[columns]) for w in works]
            return self.local.fit(self.cohort, mine, make_batch)

    def gradients(self, start: np.ndarray, examples: Sequence[np.ndarray], keys: list) -> tuple[np.ndarray, np.ndarray]:
        """Mean losses ``(S,)`` and gradients ``(S, n)``, float64, of S sets of ``examples`` at one state ``(d,)``.

        ``n`` are the columns that train in the first round; ``keys`` name the sets' dropout masks.
        """
        self._use(0)
        space = self.cohort.space
        groups = space.trains(1)
        batch = self._batch("train", examples, keys if self.cohort.has_dropout else None)
        with self.cohort.training(groups, torch.tensor(start, dtype=torch.float32)):
            row = torch.tensor(start[space.columns(groups)], dtype=torch.float32, device=self.cohort.device)
            states = row.repeat(len(examples), 1)
            losses, grads = self.cohort.gradients(states, batch)
        return losses.double().cpu().numpy(), grads.double().cpu().numpy()

    def statistic(self, kind: str, name: str, examples: Sequence[np.ndarray], clip: float | None) -> np.ndarray:
        """The statistic ``kind`` of the examples of the set ``name``, a batch at a time, summed: packed float64."""
        self._use(0)
        parts = []
        for batch in examples:
            data = self.sets[name]
            laid = CohortBatch.of([data.batch(batch)], None, self.cohort.device, data.pad_id)
            parts.append(statistics.collect(self.cohort, laid, kind, clip))
        return statistics.pack(statistics.total(parts), kind).numpy()

    def evaluate(self, state: np.ndarray, name: str, examples: np.ndarray, base: int = 0) -> Scores:
        """`Scores` of the examples of the set ``name`` under ``state`` ``(d,)``: one batch, no dropout."""
        self._use(base)
        batch = self._batch(name, [examples], None)
        with torch.no_grad():
            row = torch.tensor(np.asarray(state, dtype=np.float32), device=self.cohort.device)[None]
            logits = self.cohort.logits(self.cohort.layout.views(row), batch)
            if self.cohort.task == "classification":
                loss = classification_loss(logits, batch.labels)[0]
                targets = torch.ones_like(batch.labels[0])
                predicted = logits[0].argmax(-1)
            else:
                targets = (batch.labels[0, :, 1:] != -100).sum(-1)
                loss = causal_loss(logits, batch.labels)[0] * targets
                predicted = torch.full_like(targets, -1)
        return Scores(loss.double().cpu().numpy(), targets.cpu().numpy(), predicted.cpu().numpy())
