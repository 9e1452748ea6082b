"""Who holds what: ways to deal a training set out to clients.

Each option but `Replicated` deals every sample to at most one client. All give every client at least ``min_size``
samples, and take all chance from the generator they are given. Written here in numpy rather than taken from
flwr-datasets; docs/data.md says why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from fl.config import setting
from fl.errors import ConfigError

DRAWS = 20
Parts = list[np.ndarray]


@dataclass(frozen=True)
class Partition(ABC):
    """How samples are dealt to clients."""

    min_size: int = setting(8, ge=1, help="samples that each client holds at least")

    # Whether a client stands for a group of the data (and is called by its name).
    natural = False

    @abstractmethod
    def split(
        self,
        labels: np.ndarray | None,
        groups: np.ndarray | None,
        num_examples: int,
        num_clients: int | None,
        rng: np.random.Generator,
    ) -> Parts:
        """Sorted (but for `Replicated` disjoint) indices into the ``num_examples`` samples, one array a client.

        ``labels`` and ``groups`` are (num_examples,) int64, groups -1 where a sample has none. Raises `ConfigError`
        where the clients can't all have ``min_size`` samples.
        """


class _Dealt(Partition):
    """A partition that deals all samples to a number of clients, and then tops up the poor ones."""

    def split(self, labels, groups, num_examples, num_clients, rng):
        count = self._clients(num_examples, num_clients)
        parts = self._deal(labels, groups, num_examples, count, rng)
        return [np.sort(p) for p in fill_up(parts, self.min_size, rng)]

    @abstractmethod
    def _deal(
        self,
        labels: np.ndarray | None,
        groups: np.ndarray | None,
        num_examples: int,
        num_clients: int,
        rng: np.random.Generator,
    ) -> Parts:
        """All samples dealt to ``num_clients`` clients, which may still hold fewer than ``min_size``."""

    def _clients(self, num_examples: int, num_clients: int | None) -> int:
        name = type(self).__name__.lower()
        if num_clients is None:
            raise ConfigError("clients.number", None, f"partition={name} needs a number", "Only natural counts groups.")
        if num_clients < 1:
            raise ConfigError("clients.number", num_clients, "at least 1")
        if num_clients * self.min_size > num_examples:
            raise ConfigError(
                "partition.min_size",
                self.min_size,
                f"{num_clients} clients of {self.min_size} need {num_clients * self.min_size} samples, and there are "
                f"{num_examples}",
                "Lower partition.min_size or clients.number, or raise data.max_train.",
            )
        return num_clients


@dataclass(frozen=True)
class Iid(_Dealt):
    """Shuffled and dealt out evenly: sizes differ by one at most."""

    def _deal(self, labels, groups, num_examples, num_clients, rng):
        return np.array_split(rng.permutation(num_examples), num_clients)


@dataclass(frozen=True)
class Dirichlet(_Dealt):
    """Each label's samples go to clients in proportions drawn from ``Dirichlet(alpha, ..., alpha)``.

    Hsu et al. 2019 (arXiv:1909.06335) in the form of Yurochkin et al. 2019: one draw a label, so sizes differ too.
    Small alpha gives each client few labels, large alpha is like iid. Of up to 20 draws the first is taken in which
    every client has ``min_size`` samples; if there is none, the last is mended by `fill_up`.
    """

    alpha: float = setting(0.5, gt=0, help="concentration; small is skewed")
    by: str = setting("label", choices=("label", "group"), help="what is skewed: labels, or the data's groups")

    def _deal(self, labels, groups, num_examples, num_clients, rng):
        kinds = _kinds(self.by, labels, groups, "dirichlet")
        parts: Parts = []
        for _ in range(DRAWS):
            pieces: list[Parts] = []
            for kind in np.unique(kinds):
                samples = rng.permutation(np.flatnonzero(kinds == kind))
                shares = rng.dirichlet(np.full(num_clients, self.alpha))
                cuts = np.rint(np.cumsum(shares)[:-1] * len(samples)).astype(np.int64)
                pieces.append(np.split(samples, cuts))
            parts = [np.concatenate(p) for p in zip(*pieces, strict=True)]
            if min(len(p) for p in parts) >= self.min_size:
                break
        return parts


@dataclass(frozen=True)
class Shards(_Dealt):
    """Sorted by label, cut into ``clients x per_client`` shards, and ``per_client`` of them dealt to each client.

    McMahan et al. 2017 (arXiv:1602.05629, section 3), where each client has at most two labels or so.
    """

    per_client: int = setting(2, ge=1, help="shards of a client")
    by: str = setting("label", choices=("label", "group"), help="what is sorted: labels, or the data's groups")

    def _deal(self, labels, groups, num_examples, num_clients, rng):
        kinds = _kinds(self.by, labels, groups, "shards")
        count = num_clients * self.per_client
        if count > num_examples:
            raise ConfigError(
                "partition.per_client",
                self.per_client,
                f"{num_clients} clients x {self.per_client} are {count} shards of {num_examples} samples",
            )
        # Shuffled first, so that samples of one label come in no order.
        order = rng.permutation(num_examples)
        shards = np.array_split(order[np.argsort(kinds[order], kind="stable")], count)
        dealt = rng.permutation(count).reshape(num_clients, self.per_client)
        return [np.concatenate([shards[s] for s in row]) for row in dealt]


@dataclass(frozen=True)
class Quantity(_Dealt):
    """Clients of unlike size, each with labels as they come.

    ``law=dirichlet``: shares drawn from ``Dirichlet(alpha)``, small alpha is skewed. ``law=zipf``: the k-th largest
    client has a share in proportion to ``k ** -alpha``, large alpha is skewed; which client is which is drawn.
    """

    alpha: float = setting(0.5, gt=0, help="skew of the sizes")
    law: str = setting("dirichlet", choices=("dirichlet", "zipf"), help="dirichlet or zipf")

    def _deal(self, labels, groups, num_examples, num_clients, rng):
        if self.law == "zipf":
            shares = rng.permutation(np.arange(1, num_clients + 1, dtype=np.float64) ** -self.alpha)
            shares /= shares.sum()
        else:
            shares = rng.dirichlet(np.full(num_clients, self.alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * num_examples).astype(np.int64)
        return np.split(rng.permutation(num_examples), cuts)


@dataclass(frozen=True)
class Natural(Partition):
    """A client for each group of the data (a president, a source, a column of a file).

    Groups with fewer than ``min_size`` samples are left out, as are samples without a group. ``group_size`` > 1
    merges that many groups, drawn at random, into one client. ``clients.number`` null takes them all, a smaller
    number that many, drawn at random.
    """

    group_size: int = setting(1, ge=1, help="groups that are merged into one client")

    natural = True

    def split(self, labels, groups, num_examples, num_clients, rng):
        kinds = _kinds("group", labels, groups, "natural")
        names, sizes = np.unique(kinds[kinds >= 0], return_counts=True)
        kept = names[sizes >= self.min_size]
        most = len(kept) // self.group_size
        if most < (1 if num_clients is None else num_clients):
            raise ConfigError(
                "clients.number",
                num_clients,
                f"at most {most}: of {len(names)} groups, {len(kept)} have at least {self.min_size} samples"
                + (f", and {self.group_size} make a client" if self.group_size > 1 else ""),
                "Lower clients.number (null takes all), partition.min_size or partition.group_size.",
            )
        count = most if num_clients is None else num_clients
        if self.group_size > 1 or count < most:
            kept = rng.permutation(kept)[: count * self.group_size].reshape(count, self.group_size)
            # In the order of the data's groups, whatever was drawn.
            kept = kept[np.argsort(kept.min(axis=1))].ravel()
        kept = kept.reshape(count, self.group_size)
        return [np.flatnonzero(np.isin(kinds, row)) for row in kept]


@dataclass(frozen=True)
class Replicated(Partition):
    """Every client holds all samples: a cluster's workers with one data set, not private holders.

    The one partition that is not disjoint. `fl.schedules.gradient_coding` needs it, since each worker may compute any
    part of the sum.
    """

    def split(self, labels, groups, num_examples, num_clients, rng):
        if num_clients is None:
            raise ConfigError(
                "clients.number", None, "partition=replicated needs a number", "Only natural counts groups."
            )
        if num_examples < self.min_size:
            raise ConfigError("partition.min_size", self.min_size, f"at most the {num_examples} samples there are")
        return [np.arange(num_examples)] * num_clients


def fill_up(parts: Parts, min_size: int, rng: np.random.Generator) -> Parts:
    """Move samples, drawn at random, from the client that has most to those with fewer than ``min_size``.

    Ends after as many moves as samples are missing; there must be ``min_size`` for each client in all.
    """
    parts = [rng.permutation(p) if len(p) > min_size else p for p in parts]
    sizes = np.array([len(p) for p in parts])
    for poor in np.flatnonzero(sizes < min_size):
        while sizes[poor] < min_size:
            rich = int(np.argmax(sizes))
            parts[poor] = np.append(parts[poor], parts[rich][-1])
            parts[rich] = parts[rich][:-1]
            sizes[poor] += 1
            sizes[rich] -= 1
    return parts


def _kinds(by: str, labels: np.ndarray | None, groups: np.ndarray | None, name: str) -> np.ndarray:
    kinds = labels if by == "label" else groups
    if kinds is None:
        others = "natural, iid or quantity" if by == "label" and groups is not None else "iid or quantity"
        raise ConfigError("partition", name, f"it needs {by}s, and the data have none", f"Choose {others}.")
    return kinds
