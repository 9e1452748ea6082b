"""What the server knows between two moments (`ServerState`) and what a client hands in (`Update`).

Both are passed in and returned: whoever changes a state makes a new one and leaves the arrays of the old one alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clients.adapters.base_change import Change, grow
from clients.adapters.space import Space
from clients.layout import Layout


@dataclass(frozen=True, eq=False)
class ServerState:
    """The adapter that is being learnt, and what the rules that change it remember.

    - ``vector`` ``(d,)`` float32 (float64 in tests of the algebra): the adapter's tensors, in the order of ``layout``.
    - ``space``: what these tensors are: their groups, phases and factors.
    - ``version``: how many times the state has been changed; what a client starts from is named by it.
    - ``round``: the last round that the schedule finished.
    - ``base``: what has been added to the base's own weights so far, and ``increment``: what the newest version added
      (`folded` puts it into ``base``; an aggregation rule only states it).
    - ``optimizer``: the server optimiser's own arrays, float64, of the columns that it moves (momentum ``m``, second
      moment ``v``).
    - ``extra``: arrays of an aggregation rule that remembers something itself; any shape and type.

    Raises ValueError if the vector does not fit the layout.
    """

    vector: np.ndarray
    space: Space
    version: int = 0
    round: int = 0
    base: Change = field(default_factory=dict)
    increment: Change = field(default_factory=dict)
    optimizer: Mapping[str, np.ndarray] = field(default_factory=dict)
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vector.dtype not in (np.float32, np.float64) or self.vector.shape != (self.layout.size,):
            wanted = f"it has to be float32 ({self.layout.size},)"
            raise ValueError(f"vector is {self.vector.dtype} {self.vector.shape}; {wanted}")

    @property
    def layout(self) -> Layout:
        return self.space.layout

    def folded(self) -> ServerState:
        """The state with ``increment`` added to ``base``."""
        return self.replace(base=grow(self.base, self.increment), increment={}) if self.increment else self

    def replace(self, **changes: Any) -> ServerState:
        """A new state with ``changes``; the arrays that are not named are shared with this one."""
        return dataclasses.replace(self, **changes)

    def parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The state as named arrays and plain values, the form that `fl.checkpoint.save` takes."""
        arrays = {"server/vector": self.vector}
        arrays |= {f"server/optimizer/{name}": array for name, array in self.optimizer.items()}
        arrays |= {f"server/extra/{name}": array for name, array in self.extra.items()}
        arrays["server/base"], ranks = self.space.pack(self.base)
        meta = {
            "base_ranks": ranks,
            "version": self.version,
            "round": self.round,
            "names": list(self.layout.names),
            "shapes": [list(shape) for shape in self.layout.shapes],
        }
        return arrays, meta

    @classmethod
    def from_parts(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], space: Space) -> ServerState:
        """The state in ``space`` that `parts` took apart; other arrays of the mapping are ignored.

        Raises ValueError if it is of another layout.
        """
        if space.layout != Layout(tuple(meta["names"]), tuple(tuple(shape) for shape in meta["shapes"])):
            raise ValueError("the saved state has another layout")

        def under(prefix: str) -> dict[str, np.ndarray]:
            return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

        return cls(
            vector=arrays["server/vector"],
            space=space,
            version=meta["version"],
            round=meta["round"],
            base=space.unpack(arrays["server/base"], meta["base_ranks"]),
            optimizer=under("server/optimizer/"),
            extra=under("server/extra/"),
        )


@dataclass(frozen=True, eq=False)
class Update:
    """One client's accepted contribution.

    - ``vector`` ``(n,)``: the client's adapter after training minus the one it started from, in the ``columns``
      ``(n,)`` of the layout that it trained (None: all) and in the server's normal form (`Space.lift`).
    - ``start`` ``(d,)``: the server's vector that it started from (None: the server's present one).
    - ``start_version``: the server version that it started from; ``round``: the round that asked for it.
    - ``examples``: training examples the client holds (its weight under ``weights=examples``).
    - ``sent_ticks``, ``arrived_ticks``: virtual microseconds when the work was sent out and the reply was back.
    - ``loss``: mean training loss, or None where the client gave none; ``steps``, ``tokens``: work done.
    - ``extra``: further arrays that a method sends up beside the vector.
    - ``weight``: what it counts for, relative to the others of one step, where the schedule decides that (None: the
      aggregation rule does).
    """

    client: int
    round: int
    start_version: int
    vector: np.ndarray
    examples: int
    sent_ticks: int = 0
    arrived_ticks: int = 0
    loss: float | None = None
    steps: int = 0
    tokens: int = 0
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    columns: np.ndarray | None = None
    start: np.ndarray | None = None
    weight: float | None = None
