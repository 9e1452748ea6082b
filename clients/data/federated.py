"""A data set dealt out to clients: what each trains on, and what is held out to test it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from clients.data.partition import Partition
from clients.data.tokens import TokenData
from fl.errors import ConfigError
from fl.keys import generator

if TYPE_CHECKING:
    from clients.data.poison import Poison


@dataclass(eq=False)
class FederatedData:
    """``train`` and the central ``test``; client i trains on ``train[parts[i]]`` and is tested on
    ``train[client_tests[i]]``, which may be empty; ``train[public]`` is nobody's secret, and the server's.
    ``client_names`` are those of natural clients. Samples that only hostile clients train on lie behind those of
    ``train`` that were dealt out."""

    train: TokenData
    test: TokenData
    parts: list[np.ndarray]
    client_tests: list[np.ndarray]
    client_names: list[str] | None = None
    public: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    poison: Poison | None = None  # what hostile clients train on in place of their own samples

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def most(self) -> int:
        """More training examples than this no client has."""
        return max(len(self.train), *map(len, self.parts))

    def summary(self) -> dict[str, Any]:
        """Plain numbers of who holds what, as they go into run.json."""
        labels = self.train.labels
        count = len(self.train.label_names)
        return {
            "sizes": [len(p) for p in self.parts],
            "test_sizes": [len(p) for p in self.client_tests],
            "labels": None
            if labels is None
            else [np.bincount(labels[p], minlength=count).tolist() for p in self.parts],
            "label_names": list(self.train.label_names),
            "groups": self.client_names,
            "tokens": [int(self.train.lengths[p].sum()) for p in self.parts],
        }


def federate(
    train: TokenData,
    test: TokenData,
    partition: Partition,
    num_clients: int | None,
    seed: int,
    client_test_fraction: float,
    public: int = 0,
) -> FederatedData:
    """Set ``public`` samples of ``train`` aside, deal the rest out by ``partition``, then hold out
    ``client_test_fraction`` of each client's samples.

    The draws are those of ``seed``, the run's. A client with a positive fraction and two samples or more holds out at
    least one and trains on at least one. Raises `ConfigError`.
    """
    if not 0 <= client_test_fraction < 1:
        raise ConfigError("data.client_test_fraction", client_test_fraction, "a number >= 0 and < 1")
    if public >= len(train):
        raise ConfigError("data.public", public, f"fewer than the {len(train)} training samples")
    order = generator(seed, "public").permutation(len(train)) if public else np.arange(len(train))
    aside, rest = np.sort(order[:public]), np.sort(order[public:])
    labels = None if train.labels is None else train.labels[rest]
    groups = None if train.groups is None else train.groups[rest]
    split = partition.split(labels, groups, len(rest), num_clients, generator(seed, "partition"))
    held = [rest[samples] for samples in split]
    parts, client_tests = [], []
    for client, samples in enumerate(held):
        count = round(client_test_fraction * len(samples))
        if client_test_fraction > 0:
            count = min(max(count, 1), len(samples) - 1)
        order = generator(seed, "client-test", client).permutation(samples)
        parts.append(np.sort(order[count:]))
        client_tests.append(np.sort(order[:count]))
    return FederatedData(train, test, parts, client_tests, _names(train, held) if partition.natural else None, aside)


def _names(train: TokenData, held: list[np.ndarray]) -> list[str]:
    assert train.groups is not None
    return [" + ".join(train.group_names[g] for g in np.unique(train.groups[samples])) for samples in held]
