"""The schedule's own topology, which is the default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from fl.errors import ConfigError
from fl.topology.base import Topology
from fl.topology.fixed import Complete, Ring
from fl.topology.graph import Graph

OWN: dict[str, type[Topology]] = {"ring": Ring, "complete": Complete}  # what schedules name


@dataclass(frozen=True)
class Auto(Topology):
    """Stands for the graph that the schedule names; `resolve` makes it that."""

    name: ClassVar[str] = "auto"

    def build(self, number: int, seed: int, phase: int) -> Graph:
        raise ConfigError("topology", "auto", "the schedule has no graph of its own", "Choose one with topology=NAME.")


def resolve(topology: Topology, own: str) -> Topology:
    """``topology``, or where it is auto the one called ``own``, over the same links."""
    if not isinstance(topology, Auto):
        return topology
    return OWN[own](**{field.name: getattr(topology, field.name) for field in dataclasses.fields(Auto)})
