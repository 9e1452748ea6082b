"""Who talks to whom without a server: graphs of peers, their mixing weights, and the links between them."""

from fl.topology.base import Topology
from fl.topology.graph import Graph

__all__ = ["Graph", "Topology"]
