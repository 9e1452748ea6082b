"""Labels that only some clients hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clients.data.partition import Partition, Parts
from fl.config import setting
from fl.errors import ConfigError


@dataclass(frozen=True)
class Owned(Partition):
    """The samples of some labels are dealt out evenly to some clients, which hold nothing else; the rest to the others.

    With ``network.slow_clients`` the same clients, nobody but slow devices has these labels.
    """

    owners: list[int] = setting([0], help="clients that hold the owned labels, and nothing else")
    labels: list[int] = setting([0], help="labels that nobody else holds")

    def split(self, labels, groups, num_examples, num_clients, rng) -> Parts:
        if labels is None:
            raise ConfigError("partition", "owned", "it needs labels, and the data have none", "Choose iid.")
        if num_clients is None:
            raise ConfigError("clients.number", None, "partition=owned needs a number", "Only natural counts groups.")
        kinds = np.unique(labels).tolist()
        for key, chosen, all_of_them in (("owners", self.owners, range(num_clients)), ("labels", self.labels, kinds)):
            if not set(chosen) < set(all_of_them) or not chosen or len(set(chosen)) < len(chosen):
                allowed = f"some of {', '.join(map(str, all_of_them))}, each once and not all"
                raise ConfigError(f"partition.{key}", chosen, allowed)
        owned = np.isin(labels, self.labels)
        others = [c for c in range(num_clients) if c not in self.owners]
        parts: Parts = [np.zeros(0, np.int64)] * num_clients
        for clients, samples in ((self.owners, np.flatnonzero(owned)), (others, np.flatnonzero(~owned))):
            for client, part in zip(clients, np.array_split(rng.permutation(samples), len(clients)), strict=True):
                parts[client] = np.sort(part)
        smallest = min(len(part) for part in parts)
        if smallest < self.min_size:
            allowed = f"at most {smallest}, what the smallest client gets"
            raise ConfigError("partition.min_size", self.min_size, allowed, "Or use fewer clients.")
        return parts
