"""What an adapter's state is made of: its tensors, who trains which of them when, and the weight change they stand for.

A state is one vector ``(d,)`` in the order of a `Layout`. A `Space` adds to the layout

* **groups**: the role of each tensor (``A``, ``B``, ``R``, ``head``, ...), and **phases**: the groups that train in
  round 1, 2, ..., taken in turn. What does not train in a round is the same for all clients and is not sent up;
* **modules**: which tensors are the factors of which weight change ``s B A`` or ``s B R A``;
* **ranks** and **alphas** of the clients, where they differ: client i owns the leading block of rank ``r_i``.

The server keeps its vector in one normal form: full rank, and the scale ``s`` of the full rank. A client of rank
``r_i`` and scale ``s_i`` holds the leading block with B (or R) multiplied by ``s / s_i``, so its product is the
server's. `take` and `lift` go from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from clients.adapters import base_change
from clients.adapters.base_change import Change, Piece
from clients.layout import Layout

HEAD = "head"


@dataclass(frozen=True, eq=False)
class LowRank:
    """A weight change in factored form, ``left @ right``: ``(out, p) @ (p, in)``, of the module ``name``."""

    name: str
    left: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class Module:
    """An adapted module and the tensors of its change ``scale * B A``, ``scale * B R A`` or ``scale * B diag(g) A``.

    ``a`` ``(r, in)``, ``b`` ``(out, r)`` and ``core`` (``R`` ``(r, r)`` or ``g`` ``(r,)``; None: there is none) are
    names of the layout. ``rank`` is the full rank; where ``varies`` is false every client has it.
    """

    name: str
    a: str
    b: str
    scale: float
    rank: int
    core: str | None = None
    varies: bool = True

    @property
    def scaled(self) -> str:
        """The tensor that takes up a change of scale: the core where there is one, else B."""
        return self.core or self.b


@dataclass(frozen=True)
class Space:
    """See the module's text. ``ranks`` and ``scales`` are cycled over the clients; one entry stands for all of them."""

    layout: Layout
    groups: tuple[str, ...] = ()  # of each tensor of the layout
    phases: tuple[tuple[str, ...], ...] = ()
    modules: tuple[Module, ...] = ()
    ranks: tuple[int, ...] = ()  # of the modules that vary; empty: full rank everywhere
    scales: tuple[float, ...] = ()  # of the modules that vary, like ``ranks``
    _columns: dict = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.groups:
            object.__setattr__(self, "groups", ("adapter",) * len(self.layout.names))
        if not self.phases:
            object.__setattr__(self, "phases", (tuple(dict.fromkeys(self.groups)),))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The groups there are, in the order of the layout."""
        return tuple(dict.fromkeys(self.groups))

    def trains(self, round: int) -> tuple[str, ...]:
        """The groups that train in ``round`` (from 1)."""
        return self.phases[(round - 1) % len(self.phases)]

    @property
    def constant(self) -> bool:
        """Whether some group does not train in some round."""
        return any(set(self.names) - set(phase) for phase in self.phases)

    @property
    def moving(self) -> np.ndarray:
        """The columns ``(m,)`` of all tensors that train in some round."""
        return self.columns({group for phase in self.phases for group in phase})

    @property
    def trainable(self) -> int:
        """Scalars that train in a round, at most."""
        return max(len(self.columns(phase)) for phase in self.phases)

    @property
    def mixed(self) -> bool:
        """Whether clients have different ranks."""
        return len(set(self.ranks)) > 1

    def rank(self, module: Module, client: int | None) -> int:
        """The rank of ``client`` (None: the server's, which is the full one) at ``module``."""
        if client is None or not self.ranks or not module.varies:
            return module.rank
        return min(module.rank, self.ranks[client % len(self.ranks)])

    def scale(self, module: Module, client: int | None) -> float:
        """The scale ``s_i`` of ``client`` at ``module``."""
        if client is None or not self.scales or not module.varies:
            return module.scale
        return self.scales[client % len(self.scales)]

    def kind(self, client: int | None) -> int:
        """Clients of equal kind have equal ranks and scales."""
        return -1 if client is None or not self.ranks else client % len(self.ranks)

    @cached_property
    def of_tensor(self) -> dict[str, Module]:
        """The module that each factor belongs to."""
        return {t: m for m in self.modules for t in (m.a, m.b, m.core) if t is not None}

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """First column and one past the last of each tensor."""
        ends = np.cumsum(self.layout.sizes).tolist()
        return {n: (e - s, e) for n, s, e in zip(self.layout.names, self.layout.sizes, ends, strict=True)}

    def columns(self, groups: Iterable[str] | None = None, client: int | None = None) -> np.ndarray:
        """``(n,)`` int64, rising: the columns of the ``groups`` (None: all) that ``client`` owns (None: the server).

        The same array for the same question, so that two clients' columns can be compared by identity.
        """
        key = (frozenset(self.names if groups is None else groups), self.kind(client))
        if key not in self._columns:
            parts = [
                self._block(name, client)
                for name, group in zip(self.layout.names, self.groups, strict=True)
                if group in key[0]
            ]
            found = np.concatenate(parts) if parts else np.zeros(0, np.int64)
            found.flags.writeable = False
            self._columns[key] = found
        return self._columns[key]

    def _block(self, name: str, client: int | None) -> np.ndarray:
        return np.arange(*self.spans[name]).reshape(self.shape(name))[self.block(name, client)].reshape(-1)

    def block(self, name: str, client: int | None) -> tuple[slice, ...]:
        """The part of the tensor ``name`` that ``client`` owns: its leading rows of A, columns of B, or block of R."""
        shape, module = self.shape(name), self.of_tensor.get(name)
        if module is None:
            return tuple(slice(n) for n in shape)
        rank = slice(self.rank(module, client))
        if name == module.a:
            return (rank, *(slice(n) for n in shape[1:]))
        return (slice(shape[0]), rank) if name == module.b else (rank,) * len(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(zip(self.layout.names, self.layout.shapes, strict=True))

    def sublayout(self, groups: Iterable[str]) -> Layout:
        """The layout of the tensors of ``groups``, whole."""
        wanted = set(groups)
        kept = [i for i, g in enumerate(self.groups) if g in wanted]
        return Layout(tuple(self.layout.names[i] for i in kept), tuple(self.layout.shapes[i] for i in kept))

    def units(self, client: int | None) -> np.ndarray | None:
        """``(d,)``: what the server's vector is multiplied by to be the client's; None where that is 1 throughout."""
        key = ("units", self.kind(client))
        if key not in self._columns:
            units = None
            for module in self.modules:
                ratio = module.scale / self.scale(module, client)
                if ratio != 1:
                    units = np.ones(self.layout.size) if units is None else units
                    units[slice(*self.spans[module.scaled])] = ratio
            self._columns[key] = units
        return self._columns[key]

    def take(self, vector: np.ndarray, groups: Iterable[str] | None, client: int | None) -> np.ndarray:
        """What ``client`` holds of the server's ``vector`` ``(d,)``: its columns of ``groups``, in its own scale."""
        columns, units = self.columns(groups, client), self.units(client)
        part = vector[columns]
        return part if units is None else (part * units[columns]).astype(vector.dtype)

    def lift(self, values: np.ndarray, groups: Iterable[str] | None, client: int | None) -> np.ndarray:
        """The inverse of `take`: the client's ``values`` as the server's, for the same columns."""
        units = self.units(client)
        if units is None:
            return values
        return (values / units[self.columns(groups, client)]).astype(values.dtype)

    def factors(self, vector: np.ndarray) -> Iterator[tuple[Module, np.ndarray, np.ndarray, np.ndarray | None]]:
        """``(module, A, B, core)`` of each module: views of ``vector`` ``(d,)`` (the server's normal form)."""
        for module in self.modules:
            yield (
                module,
                self.tensor(vector, module.a),
                self.tensor(vector, module.b),
                None if module.core is None else self.tensor(vector, module.core),
            )

    def tensor(self, vector: np.ndarray, name: str) -> np.ndarray:
        """The tensor ``name``, a view of ``vector`` ``(d,)``."""
        return vector[slice(*self.spans[name])].reshape(self.shape(name))

    def delta(self, vector: np.ndarray) -> Iterator[LowRank]:
        """The weight change of each module under ``vector`` ``(d,)``, factored, in float64.

        ``left = s B``, ``s B R`` or ``s B diag(g)``; ``right = A``.
        """
        for module, a, b, core in self.factors(vector):
            left = module.scale * b.astype(np.float64)
            if core is not None:
                left = left @ core if core.ndim == 2 else left * core
            yield LowRank(module.name, left, a.astype(np.float64))

    def sizes(self, module: Module) -> tuple[int, int]:
        """``(out, in)`` of the module's weight change."""
        return self.shape(module.b)[0], math.prod(self.shape(module.a)[1:])

    def pack(self, change: Change) -> tuple[np.ndarray, list[int]]:
        """A change of the base as one vector and the modules' ranks (`clients.adapters.base_change.pack`)."""
        return base_change.pack(change, [m.name for m in self.modules])

    def unpack(self, vector: np.ndarray, ranks: Sequence[int]) -> dict[str, Piece]:
        """Undo `pack`. Raises ValueError if the length is another."""
        return base_change.unpack(vector, ranks, [m.name for m in self.modules], [self.sizes(m) for m in self.modules])
