"""A graph from a file: one edge a line, or JSON.

Text (any ending but .json)::

    # who hears whom
    0 1
    1 2        # a comment goes on to the end of its line
    2, 0

JSON: ``[[0, 1], [1, 2], [2, 0]]``, or the same list as ``edges`` of an object. Peers are numbered from 0; a directed
edge is from, to. Loops and edges that are given twice are refused, and so is a graph that is not connected.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fl.config import setting
from fl.errors import ConfigError
from fl.topology.base import Topology
from fl.topology.graph import Graph

KEY = "topology.path"


@dataclass(frozen=True)
class File(Topology):
    """The graph of a file; ``edges`` are its (place, i, j), the place in words."""

    path: str | None = setting(None, help="file with the edges, as text or .json (see fl.topology.file)")
    directed: bool = setting(False, help="whether an edge is a link from its first peer to its second only")
    name: ClassVar[str] = "file"
    edges: tuple[tuple[str, int, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(KEY, self.path, "a file with edges is needed", f"Give one with {KEY}=FILE.")
        object.__setattr__(self, "edges", read_edges(self.path, self.directed))

    def check(self, number: int) -> None:
        super().check(number)
        for place, *peers in self.edges:
            if max(peers) >= number:
                allowed = f"{place}: there are peers 0 to {number - 1}, no {max(peers)}"
                raise ConfigError(KEY, self.path, allowed, "Raise clients.number, or correct the file.")
        graph = self._graph(number)
        if not graph.connected:
            apart = int(np.argmax(graph.components != graph.components[0]))
            way = "from peer 0 and back" if self.directed else "from peer 0"
            allowed = f"a {'strongly ' if self.directed else ''}connected graph; peer {apart} can't be reached {way}"
            raise ConfigError(KEY, self.path, allowed, "Add edges, or lower clients.number.")

    def build(self, number: int, seed: int, phase: int) -> Graph:
        return self._graph(number)

    def _graph(self, number: int) -> Graph:
        return Graph.of(number, np.array([edge[1:] for edge in self.edges]), self.directed)


def read_edges(path: str, directed: bool = False) -> tuple[tuple[str, int, int], ...]:
    """The edges of ``path`` as (place, i, j). Raises `ConfigError` naming the line, or in JSON the edge's number."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(KEY, path, f"a file that can be read ({error})") from error
    found: dict[tuple[int, int], tuple[str, int, int]] = {}
    for place, edge in _of_json(text, path) if path.lower().endswith(".json") else _of_lines(text):
        whole = isinstance(edge, list) and len(edge) == 2 and all(type(v) is int and v >= 0 for v in edge)
        if not whole:
            raise ConfigError(KEY, path, f"{place}: two whole numbers from 0 on, not {edge!r}")
        i, j = edge
        if i == j:
            raise ConfigError(KEY, path, f"{place}: an edge joins two different peers, not {i} and {j}")
        pair = (i, j) if directed else (min(i, j), max(i, j))
        if pair in found:
            raise ConfigError(KEY, path, f"{place}: the edge {i} {j} is there already, in {found[pair][0]}")
        found[pair] = (place, i, j)
    if not found:
        raise ConfigError(KEY, path, "one edge or more; there is none")
    return tuple(found.values())


def _of_lines(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if words:
            yield f"line {number}", [int(w) if w.isascii() and w.isdecimal() else w for w in words]


def _of_json(text: str, path: str) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(KEY, path, f"line {error.lineno}: it is not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise ConfigError(KEY, path, f"JSON that can be read ({type(error).__name__})") from error
    edges = content.get("edges") if isinstance(content, dict) else content
    if not isinstance(edges, list):
        raise ConfigError(KEY, path, "a list of edges [[i, j], ...], or an object with such a list as edges")
    for number, edge in enumerate(edges, start=1):
        yield f"edge {number}", edge
