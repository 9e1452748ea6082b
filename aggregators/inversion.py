"""Stale updates made fresh by gradient inversion ("unlimited staleness").

    D_i       = argmin || U(x_start; D) - Delta_i ||_1          data that would have given client i's stale update
    Delta_hat = U(x; D_i)                                       what the same data give from the present version

(Wang and Gao, arXiv 2309.13536, section 3; U is in `clients.unrolled`.) The client does nothing more, and no data but
the server's own are needed. Late in training the error of the inversion exceeds that of staleness. Both are measured,
when the next update Delta' of a client arrives, which started from x_start':

    E1 = || U(x_start'; D_i) - Delta' ||_1        E2 = || Delta_i - Delta' ||_1

Once the mean of E1 over the last ``window`` of them exceeds ``switch_ratio`` times that of E2, updates are used as they
are, to the end of the run.

This reconstructs clients' data as well as an update shows them: it is an attack on privacy that the server runs.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from aggregators.staleness import Staleness, Treatment
from fl.config import setting
from fl.errors import ConfigError
from fl.state import ServerState, Update

if TYPE_CHECKING:
    from clients.inversion import Estimate, Inverter
    from fl.experiment import Experiment, Settings

_OTHER = "Or use another aggregator.staleness."


@dataclass(frozen=True)
class Inversion(Staleness):
    """Stale updates replaced by what their estimated data give from the present version.

    Needs a client algorithm that can be unrolled: full batches, SGD, a constant learning rate. The estimate of a client
    begins from its last one.
    """

    samples: int = setting(16, ge=1, help="m: made-up samples of a client")
    tokens: int = setting(8, ge=2, help="tokens of a made-up sample")
    iterations: int = setting(200, ge=1, help="steps of the search for them")
    lr: float = setting(0.1, gt=0, le=1, help="first step of the search; for X as a share of its range")
    matched: float = setting(1.0, gt=0, le=1, help="share of an update's coordinates, the largest, that are matched")
    min_staleness: int = setting(1, ge=1, help="updates that are less stale are used as they are")
    switch_ratio: float = setting(1.0, gt=0, help="inversion ends when E1 exceeds this times E2; see window")
    window: int = setting(8, ge=1, help="measured pairs (E1, E2) over which their means are taken")
    handover: int = setting(0, ge=0, help="versions over which estimates give way to plain updates at the end")
    max_clients: int = setting(256, ge=1, help="clients whose estimated data are kept, the last heard")

    def check(self, settings: Settings) -> None:
        from clients.local.optimizers import SGD
        from clients.local.proximal import FedProx
        from clients.local.training import LocalTraining
        from privacy.dp_sgd import DPSGD
        from privacy.local_dp import LocalDP
        from privacy.none import NoPrivacy

        def refuse(key: str, value: object, allowed: str, way_out: str = _OTHER) -> None:
            raise ConfigError(key, value, f"{allowed} with aggregator.staleness=inversion", way_out)

        local, adapter, aggregator = settings.local, settings.adapter, settings.aggregator
        if settings.secure_aggregation.active:
            refuse("secure_aggregation", type(settings.secure_aggregation).__name__, "none: it needs single updates")
        if not isinstance(settings.privacy, NoPrivacy | DPSGD | LocalDP):
            allowed = "none, or one whose noise is in every update when it leaves its client (dp_sgd, local): what is"
            allowed += " estimated from an update without noise is covered by no claim"
            refuse("privacy", type(settings.privacy).__name__, allowed)
        if type(local) not in (LocalTraining, FedProx) or not isinstance(local.optimizer, SGD):
            name = f"{type(local).__name__} with {type(local.optimizer).__name__}"
            refuse("local", name, "plain local training or fedprox with SGD, whose steps can be unrolled", "local=sgd.")
        if local.lr_schedule != "constant" or local.lr_warmup_rounds:
            refuse("local.lr_schedule", local.lr_schedule, "constant and without warm-up: all versions have one lr")
        if settings.model.dropout or getattr(adapter, "dropout", 0):
            refuse("model.dropout", settings.model.dropout, "0, and adapter.dropout too: the steps are repeated")
        if adapter.mixed_ranks or adapter.form == "alternating":
            refuse("adapter", type(adapter).__name__, "one rank for all, and the same tensors in every round")
        if aggregator.stateful:
            refuse(
                "aggregator", type(aggregator).__name__, "a rule that leaves the base and frozen factors as they are"
            )

    def treatment(self, experiment: Experiment) -> Treatment:
        import torch

        from clients.inversion import Inverter, Search

        local = experiment.settings.local
        largest = max(len(part) for part in experiment.data.parts)
        if largest > local.batch_size:
            allowed = f"at least {largest}, all examples of a client, with aggregator.staleness=inversion"
            raise ConfigError("local.batch_size", local.batch_size, allowed, _OTHER)
        device = experiment.plan.device if experiment.plan is not None else "cpu"
        # Fused attention kernels have no second derivative.
        cohort = experiment.cohort(torch.float32, "eager", device)
        search = Search(self.iterations, self.lr, self.matched)
        inverter = Inverter(cohort, local, search, self.samples, self.tokens, experiment.settings.seed)
        self._check_unknowns(inverter.unknowns, cohort.space.trainable)
        return Inverted(self, inverter)

    def _check_unknowns(self, unknowns: int, trainable: int) -> None:
        """A sparsified update has to say more than what is sought from it; a whole one says what it can."""
        kept = round(self.matched * trainable)
        if self.matched < 1 and kept < unknowns:
            allowed = f"1, or enough for the {unknowns} numbers of {self.samples} samples of {self.tokens} tokens: "
            allowed += f"this keeps {kept} of {trainable} coordinates"
            way_out = "Raise it, or lower aggregator.staleness.samples or tokens."
            raise ConfigError("aggregator.staleness.matched", self.matched, allowed, way_out)


@dataclass
class Known:
    """What is kept of a client: the estimate of its data, and the last update ``(n,)`` that came from it."""

    estimate: Estimate
    delta: np.ndarray


class Inverted(Treatment):
    """One run's inversions. ``pairs`` are the last measured (E1, E2), ``stopped`` the version in which inversion ended.

    Which update was inverted when follows from the updates alone, never from their order within a server step.
    """

    def __init__(self, settings: Inversion, inverter: Inverter):
        self.settings, self.inverter = settings, inverter
        self.known: OrderedDict[int, Known] = OrderedDict()  # by client, the last inverted at the end
        self.pairs: list[tuple[float, float]] = []
        self.stopped: int | None = None
        self._distances: list[float] = []

    def apply(self, server: ServerState, updates: Sequence[Update]) -> list[Update]:
        self.inverter.use(server.base)
        fresh: dict[int, Update] = {}
        for wave in waves([u for u in updates if u.start is not None]):
            self._measure(wave)
            self._decide(server.version)
            fresh |= self._refresh(server, wave)
        return [fresh.get(id(u), u) for u in updates]

    def numbers(self) -> dict[str, float | int | None]:
        """Since the last call: updates inverted, and how far their estimates are from them (L1, relative). E1, E2."""
        done, self._distances = self._distances, []
        e1, e2 = np.mean(self.pairs, axis=0).tolist() if self.pairs else (None, None)
        return {
            "inverted": len(done),
            "inversion_distance": float(np.mean(done)) if done else None,
            "inversion_error": e1,
            "staleness_error": e2,
        }

    def parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays: dict[str, np.ndarray] = {}
        for client, known in self.known.items():
            kept = {"x": known.estimate.x, "y": known.estimate.y, "delta": known.delta}
            arrays |= {f"inversion/{client}/{name}": array for name, array in kept.items()}
        return arrays, {"clients": list(self.known), "pairs": [list(p) for p in self.pairs], "stopped": self.stopped}

    def restore(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        from clients.inversion import Estimate

        self.known = OrderedDict()
        for client in meta["clients"]:
            x, y, delta = (arrays[f"inversion/{client}/{name}"] for name in ("x", "y", "delta"))
            self.known[client] = Known(Estimate(x, y), delta)
        self.pairs = [(e1, e2) for e1, e2 in meta["pairs"]]
        self.stopped = meta["stopped"]

    def share(self, version: int) -> float:
        """What an estimate counts for, beside the update: 1, and at the end 0, falling over ``handover`` versions."""
        if self.stopped is None:
            return 1.0
        return max(0.0, 1 - (version - self.stopped + 1) / (self.settings.handover + 1))

    def _measure(self, wave: Sequence[Update]) -> None:
        """The errors that the clients' estimates, and their last updates, make of their new ones."""
        seen = [u for u in wave if u.client in self.known]
        if not seen:
            return
        estimates = [self.known[u.client].estimate for u in seen]
        for update, change in zip(seen, self._changes([_start(u) for u in seen], estimates, seen), strict=True):
            known = self.known[update.client]
            self.pairs.append((_distance(change, update.vector), _distance(known.delta, update.vector)))
            known.delta = update.vector
        self.pairs = self.pairs[-self.settings.window :]

    def _decide(self, version: int) -> None:
        if self.stopped is None and len(self.pairs) == self.settings.window:
            e1, e2 = np.mean(self.pairs, axis=0)
            if e1 > self.settings.switch_ratio * e2:
                self.stopped = version

    def _refresh(self, server: ServerState, wave: Sequence[Update]) -> dict[int, Update]:
        """The stale updates of ``wave`` as their estimated data make them, by identity.

        An update that the estimate explains no better than zero would (or that makes no finite one) stays as it is.
        """
        share = self.share(server.version)
        if share == 0:
            self.known.clear()
            return {}
        stale = [u for u in wave if server.version - u.start_version >= self.settings.min_staleness]
        if not stale:
            return {}
        first = [
            self.known[u.client].estimate if u.client in self.known else self.inverter.first(u.client) for u in stale
        ]
        deltas = [u.vector for u in stale]
        estimates, distances = self.inverter.invert([_start(u) for u in stale], deltas, first, stale[0].columns)
        changes = self._changes([server.vector] * len(stale), estimates, stale)
        fresh = {}
        for update, estimate, distance, change in zip(stale, estimates, distances, changes, strict=True):
            if not (distance < 1 and np.isfinite(change).all()):
                continue
            self._distances.append(distance)
            vector = (share * change + (1 - share) * update.vector).astype(change.dtype)
            fresh[id(update)] = replace(update, vector=vector, start=server.vector, start_version=server.version)
            self.known[update.client] = Known(estimate, update.vector)
            self.known.move_to_end(update.client)
        while len(self.known) > self.settings.max_clients:
            self.known.popitem(last=False)
        return fresh

    def _changes(
        self, starts: Sequence[np.ndarray], estimates: Sequence[Estimate], updates: Sequence[Update]
    ) -> list[np.ndarray]:
        return self.inverter.changes(starts, estimates, updates[0].columns)


def waves(updates: Sequence[Update]) -> list[list[Update]]:
    """``updates`` in parts with at most one of each client, a client's older ones first; in order of the clients."""
    out: list[list[Update]] = []
    heard: Counter[int] = Counter()
    for update in sorted(updates, key=lambda u: (u.client, u.start_version, u.round)):
        if heard[update.client] == len(out):
            out.append([])
        out[heard[update.client]].append(update)
        heard[update.client] += 1
    return out


def _start(update: Update) -> np.ndarray:
    assert update.start is not None
    return update.start


def _distance(change: np.ndarray, update: np.ndarray) -> float:
    return float(np.abs(np.subtract(change, update, dtype=np.float64)).sum())
