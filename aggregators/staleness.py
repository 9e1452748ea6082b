"""What becomes of an update that started from an old version (``aggregator.staleness``).

With ``u`` the staleness of an update, the versions that the server has made since the one it started from, a rule
either lets it count less, ``s(u)``, or changes it into what a fresh update might have been (`Treatment`)::

    constant     s(u) = 1
    polynomial   s(u) = (1 + u)^-a                                  FedAsync (Xie et al., arXiv 1903.03934, section 5)
    hinge        s(u) = 1 if u <= b, else 1 / (a (u - b) + 1)       the same; FedBuff (arXiv 2106.06639) has a = 1/2
    exponential  s(u) = 2^(-u / h)
    dc_asgd      u_i - lam u_i^2 (x - x_start), element by element  DC-ASGD (Zheng et al., arXiv 1609.08326, eq. 10)

All have s(0) = 1 and none rises. How much a fresh update counts is the schedule's affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fl.config import setting
from fl.state import ServerState, Update

if TYPE_CHECKING:
    from fl.experiment import Experiment, Settings


class Treatment:
    """Stale updates made fresher, over one run; this one leaves them as they are."""

    def apply(self, server: ServerState, updates: Sequence[Update]) -> list[Update]:
        """The ``updates`` of one server step, as they would be if they had started from ``server``."""
        return list(updates)

    def numbers(self) -> dict[str, float | int | None]:
        """What the last `apply` did, for the records; empty where there is nothing to say."""
        return {}

    def parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What it remembers, as arrays and plain values for a checkpoint; undone by `restore`."""
        return {}, {}

    def restore(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Undo `parts`; other arrays are ignored."""


@dataclass(frozen=True)
class Staleness:
    """A rule for stale updates; the settings are fields."""

    def factor(self, staleness: int) -> float:
        """``s(u)``: what an update of staleness ``u`` counts for, relative to a fresh one."""
        return 1.0

    @property
    def weighs(self) -> bool:
        """Whether ``s(u)`` is anything but 1."""
        return type(self).factor is not Staleness.factor

    def check(self, settings: Settings) -> None:
        """Raise `ConfigError`, before anything loads, where this rule can't be used with the other settings."""

    def treatment(self, experiment: Experiment) -> Treatment:
        """What changes the stale updates of one run."""
        return Treatment()


@dataclass(frozen=True)
class Auto(Staleness):
    """The schedule's own rule: polynomial with a = 1/2 under fedasync and fedbuff, constant elsewhere."""


@dataclass(frozen=True)
class Constant(Staleness):
    """Stale updates count as fresh ones do."""


@dataclass(frozen=True)
class Polynomial(Staleness):
    """``s(u) = (1 + u)^-exponent``."""

    exponent: float = setting(0.5, ge=0, le=10, help="a of (1 + u)^-a")

    def factor(self, staleness: int) -> float:
        return (1.0 + staleness) ** -self.exponent


@dataclass(frozen=True)
class Hinge(Staleness):
    """``s(u) = 1`` up to ``u = threshold``, then ``1 / (slope (u - threshold) + 1)``."""

    slope: float = setting(10.0, ge=0, help="a: how fast the weight falls beyond the threshold")
    threshold: int = setting(4, ge=0, help="b: versions that an update may be old at full weight")

    def factor(self, staleness: int) -> float:
        return 1.0 / (self.slope * max(0, staleness - self.threshold) + 1.0)


@dataclass(frozen=True)
class Exponential(Staleness):
    """``s(u) = 2^(-u / half_life)``, the weighting that gradient inversion is compared with (arXiv 2309.13536)."""

    half_life: float = setting(20.0, gt=0, help="versions in which the weight halves")

    def factor(self, staleness: int) -> float:
        return 2.0 ** (-staleness / self.half_life)


@dataclass(frozen=True)
class DCASGD(Staleness):
    """Delay compensation: a first-order step from the old version to the present one.

    The gradient at x is that at x_start plus the Hessian times ``x - x_start``, and the Hessian is taken for
    ``lam0 g g^T``, of which the diagonal is kept. With ``u_i = -eta g`` that is the formula above, with
    ``lam = lam0 / eta``.
    """

    lam: float = setting(4.0, ge=0, help="strength: DC-ASGD's lambda over the client's learning rate")

    def treatment(self, experiment: Experiment) -> Treatment:
        return _Compensation(self.lam)


class _Compensation(Treatment):
    def __init__(self, lam: float):
        self.lam = lam

    def apply(self, server: ServerState, updates: Sequence[Update]) -> list[Update]:
        return [replace(u, vector=self._fresh(server, u)) if u.start is not None else u for u in updates]

    def _fresh(self, server: ServerState, update: Update) -> np.ndarray:
        vector = update.vector.astype(np.float64)
        return vector - self.lam * vector**2 * drift(server, update)


def drift(server: ServerState, update: Update) -> np.ndarray:
    """``x - x_start`` ``(n,)`` float64 in the columns of ``update``: how far the server has moved since its start."""
    assert update.start is not None
    columns = slice(None) if update.columns is None else update.columns
    return np.subtract(server.vector[columns], update.start[columns], dtype=np.float64)
