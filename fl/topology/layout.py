"""Where a picture of a graph has its peers: deterministic, (n, 2), within [-1, 1]."""

from __future__ import annotations

import numpy as np

from fl.topology.graph import Graph


def circle(number: int) -> np.ndarray:
    """Peer 0 at the top, the others clockwise."""
    angle = np.pi / 2 - 2 * np.pi * np.arange(number) / number
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def hub(number: int) -> np.ndarray:
    """Peer 0 in the middle, the others on a circle."""
    return np.concatenate([np.zeros((1, 2)), circle(number - 1)])


def grid(rows: int, columns: int) -> np.ndarray:
    """Peer r columns + c in row r (the first at the top) and column c."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    longest = max(rows, columns) - 1
    return np.stack([2 * column - (columns - 1), (rows - 1) - 2 * row], axis=1) / max(1, longest)


def spring(graph: Graph) -> np.ndarray:
    """Fruchterman and Reingold's forces, from a fixed start."""
    import networkx

    drawn = networkx.Graph()
    drawn.add_nodes_from(range(graph.number))
    drawn.add_edges_from(graph.edges.tolist())
    start = dict(enumerate(circle(graph.number)))
    found = networkx.spring_layout(drawn, pos=start, iterations=200, seed=0)
    return np.array([found[peer] for peer in range(graph.number)])
