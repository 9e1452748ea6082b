"""What the server knows between two moments (`ServerState`) and what a client hands in (`Update`).

Both are passed in and returned: whoever changes a state makes a new one and leaves the arrays of the old one alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clients.layout import Layout


@dataclass(frozen=True, eq=False)
class ServerState:
    """The adapter that is being learnt, and what the rules that change it remember.

    - ``vector`` ``(d,)`` float32: the adapter's tensors, in the order of ``layout``.
    - ``version``: how many times ``vector`` has been changed; what a client starts from is named by it.
    - ``round``: the last round that the schedule finished.
    - ``optimizer``: the server optimiser's own arrays, each ``(d,)`` float64 (momentum ``m``, second moment ``v``).
    - ``extra``: arrays of an aggregation rule that remembers something itself; any shape and type.

    Raises ValueError if an array does not fit the layout.
    """

    vector: np.ndarray
    layout: Layout
    version: int = 0
    round: int = 0
    optimizer: Mapping[str, np.ndarray] = field(default_factory=dict)
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require("vector", self.vector, np.float32, self.layout.size)
        for name, array in self.optimizer.items():
            _require(f"optimizer[{name!r}]", array, np.float64, self.layout.size)

    def replace(self, **changes: Any) -> ServerState:
        """A new state with ``changes``; the arrays that are not named are shared with this one."""
        return dataclasses.replace(self, **changes)

    def parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The state as named arrays and plain values, the form that `fl.checkpoint.save` takes."""
        arrays = {"server/vector": self.vector}
        arrays |= {f"server/optimizer/{name}": array for name, array in self.optimizer.items()}
        arrays |= {f"server/extra/{name}": array for name, array in self.extra.items()}
        meta = {
            "version": self.version,
            "round": self.round,
            "names": list(self.layout.names),
            "shapes": [list(shape) for shape in self.layout.shapes],
        }
        return arrays, meta

    @classmethod
    def from_parts(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> ServerState:
        """The state that `parts` took apart; other arrays of the mapping are ignored."""

        def under(prefix: str) -> dict[str, np.ndarray]:
            return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

        return cls(
            vector=arrays["server/vector"],
            layout=Layout(tuple(meta["names"]), tuple(tuple(shape) for shape in meta["shapes"])),
            version=meta["version"],
            round=meta["round"],
            optimizer=under("server/optimizer/"),
            extra=under("server/extra/"),
        )


@dataclass(frozen=True, eq=False)
class Update:
    """One client's accepted contribution.

    - ``vector`` ``(d,)`` float32: the client's adapter after training minus the one it started from.
    - ``start_version``: the server version that it started from; ``round``: the round that asked for it.
    - ``examples``: training examples the client holds (its weight under ``weights=examples``).
    - ``sent_ticks``, ``arrived_ticks``: virtual microseconds when the work was sent out and the reply was back.
    - ``loss``: mean training loss, or None where the client gave none; ``steps``, ``tokens``: work done.
    - ``extra``: further arrays that a method sends up beside the vector.
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


def _require(name: str, array: np.ndarray, dtype: type, size: int) -> None:
    if array.dtype != dtype or array.shape != (size,):
        raise ValueError(f"{name} is {array.dtype} {array.shape}; it has to be {np.dtype(dtype)} ({size},)")
