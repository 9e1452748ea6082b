"""Gradient inversion: made-up samples whose local training would have given an update.

    (X, Y) = argmin || U(w_start; X, Y) - Delta ||_1

for an update Delta that started from w_start (Wang and Gao, arXiv 2309.13536, section 3), by Adam on the gradient in Y
and on the sign of the gradient in X. U is in `clients.unrolled`. Then U(w; X, Y) says what the same client would have
answered from another w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clients.adapters.base_change import Change
from clients.cohort import Cohort
from clients.local.training import LocalTraining
from clients.unrolled import Entrance, Samples, Unrolled
from fl.keys import torch_generator

DECAYS = (3 / 8, 5 / 8, 7 / 8)  # of the iterations, where the step of the search falls to a tenth
PROBE = 256  # random sequences whose hidden states say what a hidden state can be
SLOTS = 8  # updates that are inverted in one pass


@dataclass(frozen=True)
class Search:
    """How samples are sought. ``lr`` is the first step, for X as a share of its range; it falls to a tenth at `DECAYS`.

    ``matched`` is the share of Delta's coordinates, the largest, that are matched.
    """

    iterations: int = 200
    lr: float = 0.1
    matched: float = 1.0

    def run(
        self, unrolled: Unrolled, start: Tensor, target: Tensor, first: Samples, low: Tensor, high: Tensor,
        trained: Tensor | None = None,
    ) -> tuple[Samples, Tensor]:  # fmt: skip
        """The samples found from ``first`` on, and their distances ``(S,)``, relative to the target's L1 norm.

        ``start`` and ``target`` are ``(S, d)``; X stays between ``low`` and ``high`` ``(h,)``. Each slot gives the best
        samples that it has seen; slots don't touch.
        """
        kept = largest(target, self.matched, target.shape[1] if trained is None else int(trained.sum()))
        size = (target.abs() * kept).sum(1).clamp(min=torch.finfo(target.dtype).tiny)
        width = (high - low).clamp(min=1e-6)
        z = ((first.x - low) / width).clamp(0, 1).requires_grad_()
        y = first.y.clone().requires_grad_()
        best = Samples(z.detach().clone(), y.detach().clone())
        least = torch.full_like(size, torch.inf)
        optimizer = torch.optim.Adam([z, y])
        for lr in [*self._rates(), None]:
            change = unrolled.change(start, Samples(low + width * z, y), trained)
            distance = ((change - target).abs() * kept).sum(1) / size
            better = distance.detach() < least
            least[better] = distance.detach()[better]
            best.x[better], best.y[better] = z.detach()[better], y.detach()[better]
            if lr is None:
                break
            slope, y.grad = torch.autograd.grad(distance.sum(), [z, y])
            z.grad = slope.sign()
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            with torch.no_grad():
                z.clamp_(0, 1)
        return Samples(low + width * best.x, best.y), least

    def _rates(self) -> Iterator[float]:
        for i in range(self.iterations):
            yield self.lr * 0.1 ** sum(i >= share * self.iterations for share in DECAYS)


def largest(target: Tensor, share: float, among: int) -> Tensor:
    """``(S, d)`` bool: in each row the ``share`` of ``among`` entries that are largest in magnitude."""
    if share == 1:
        return torch.ones_like(target, dtype=torch.bool)
    top = target.abs().topk(max(1, round(share * among)), dim=1).indices
    return torch.zeros_like(target, dtype=torch.bool).scatter_(1, top, True)


@dataclass
class Estimate:
    """Made-up samples of one client: ``x`` ``(m, T, h)`` and ``y`` ``(m, C)`` or ``(m, T - 1, V)``, as in `Samples`."""

    x: np.ndarray
    y: np.ndarray


class Inverter:
    """Estimates of clients' data from their updates, ``number`` samples of ``width`` tokens each, in this process.

    X begins as the hidden states of random tokens, and stays in the range that such states have. Y begins near 0, since
    labels that are sure and wrong hardly move.
    """

    def __init__(self, cohort: Cohort, local: LocalTraining, search: Search, number: int, width: int, seed: int):
        self.cohort, self.search, self.number, self.width, self.seed = cohort, search, number, width, seed
        self.unrolled, self.entrance = Unrolled(cohort, local), Entrance(cohort)
        probe = self.entrance.random(PROBE, width, torch_generator(seed, "inversion", "range")).flatten(0, 1)
        self.low, self.high = probe.amin(0), probe.amax(0)
        self._base: Change | None = None

    def use(self, base: Change) -> None:
        """From now on ``base`` is added to the model's own weights."""
        if base is not self._base:
            self.cohort.load_base(base)
            self._base = base

    @property
    def unknowns(self) -> int:
        """Numbers in an estimate."""
        first = self.first(0)
        return first.x.size + first.y.size

    def first(self, client: int) -> Estimate:
        """What the search begins with where ``client`` has no estimate."""
        generator = torch_generator(self.seed, "inversion", client)
        x = self.entrance.random(self.number, self.width, generator)
        classes = self.entrance.outputs
        shape = (
            (self.number, classes) if self.cohort.task == "classification" else (self.number, self.width - 1, classes)
        )
        return Estimate(x.cpu().numpy(), 0.1 * torch.randn(shape, generator=generator).numpy())

    def invert(
        self,
        starts: Sequence[np.ndarray],
        deltas: Sequence[np.ndarray],
        first: Sequence[Estimate],
        columns: np.ndarray | None = None,
    ) -> tuple[list[Estimate], list[float]]:
        """Estimates, from ``first`` on, of the data that gave the updates ``deltas`` ``(n,)`` from ``starts`` ``(d,)``.

        Beside them their distances from the updates: L1, relative to the updates' norms. ``columns`` ``(n,)`` are those
        that train (None: all).
        """
        found, distances = [], []
        for low in range(0, len(starts), SLOTS):
            part = slice(low, low + SLOTS)
            start = self._rows(starts[part])
            target, trained = start.new_zeros(start.shape), self._trained(columns)
            target[:, slice(None) if trained is None else trained] = self._rows(deltas[part])
            samples, distance = self.search.run(
                self.unrolled, start, target, self._samples(first[part]), self.low, self.high, trained
            )
            found += [Estimate(x, y) for x, y in zip(samples.x.cpu().numpy(), samples.y.cpu().numpy(), strict=True)]
            distances += distance.tolist()
        return found, distances

    def changes(
        self, starts: Sequence[np.ndarray], estimates: Sequence[Estimate], columns: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """The updates ``(n,)`` that the estimated data give from ``starts`` ``(d,)``."""
        out: list[np.ndarray] = []
        for low in range(0, len(starts), SLOTS):
            part, trained = slice(low, low + SLOTS), self._trained(columns)
            change = self.unrolled.change(self._rows(starts[part]), self._samples(estimates[part]), trained).detach()
            out += list((change if trained is None else change[:, trained]).cpu().numpy())
        return out

    def _trained(self, columns: np.ndarray | None) -> Tensor | None:
        if columns is None:
            return None
        trained = torch.zeros(self.cohort.layout.size, dtype=torch.bool, device=self.cohort.device)
        trained[torch.tensor(columns, device=self.cohort.device)] = True
        return trained

    def _rows(self, vectors: Sequence[np.ndarray]) -> Tensor:
        return torch.tensor(np.stack(vectors), dtype=self.low.dtype, device=self.cohort.device)

    def _samples(self, estimates: Sequence[Estimate]) -> Samples:
        return Samples(self._rows([e.x for e in estimates]), self._rows([e.y for e in estimates]))
