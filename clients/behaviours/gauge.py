"""Gauge attack: factors that stand for the same weight change and lie far from everybody else's.

``s B A = s (B M)(M^-1 A)`` for every invertible M, so what a model computes does not fix its factors. A hostile client
trains honestly and then sends ``B M`` and ``M^-1 A``:

* ``kind=scale``: ``M = g I``: B is multiplied by g, and A divided by it;
* ``kind=rotation``: ``M`` an orthogonal matrix, drawn for each client, round and module. All norms stay as they are.

Judged by its weight change it is an honest client, to float32 rounding. Judged by its factors it is an outlier, and a
mean of factors that takes it in mixes bases that have nothing to do with each other. Rules that act on A and B one by
one are therefore meaningless unless clients share one of the factors, as they do with adapter=ffa, or the rule acts
on ``B A``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clients.behaviours.base import Facts
from clients.behaviours.crafted import Crafted
from fl.config import setting
from fl.errors import ConfigError, ShoalError
from fl.keys import generator

if TYPE_CHECKING:
    from clients.adapters.space import Module, Space

_WAY_OUT = "Use adapter=lora, in which both factors train."


@dataclass(frozen=True)
class Gauge(Crafted):
    """Each hostile client sends its own state in another basis. Needs an adapter whose A and B train together."""

    kind: str = setting("scale", choices=["scale", "rotation"], help="how the basis changes: scaled, or rotated")
    gain: float = setting(10.0, gt=0, help="what B is multiplied and A divided by (kind=scale)")

    def check(self, settings: Any) -> None:
        super().check(settings)
        adapter = settings.adapter
        if adapter.form not in ("lora", "gated"):
            allowed = (
                "one whose factors A and B train together: with one of them fixed, no other basis gives the change"
            )
            raise ConfigError("adapter", type(adapter).__name__, f"{allowed} (attack=gauge)", _WAY_OUT)
        if adapter.form == "gated" and self.kind == "rotation":
            allowed = "scale with an adapter that has a gate between its factors"
            raise ConfigError("attack.kind", self.kind, allowed, _WAY_OUT)

    def vectors(self, seen: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        """``(f, d)``: the difference that makes the client's state after training that in the other basis."""
        space, starts = facts.space, facts.starts
        if space is None or not space.modules:
            raise ShoalError(f"attack=gauge needs an adapter of factors A and B, and this one has none. {_WAY_OUT}")
        if starts is None and not facts.states:
            raise ShoalError("attack=gauge needs the states that the updates start from, which it was not given.")
        states = own.astype(np.float64) if facts.states else np.asarray(starts, np.float64) + own
        out = own.astype(np.float64)
        columns = np.arange(space.layout.size) if facts.columns is None else facts.columns
        for row, client in enumerate(facts.hostile):
            for module in space.modules:
                a = _places(space, module.a, client, columns)
                b = _places(space, module.b, client, columns)
                factor_a = states[row, a].reshape(len(a), -1)  # (r, in)
                factor_b = states[row, b].reshape(b.shape[:2])  # (out, r)
                new_b, new_a = self._turn(module, factor_b, factor_a, facts, client)
                out[row, a] += (new_a - factor_a).reshape(a.shape)
                out[row, b] += (new_b - factor_b).reshape(b.shape)
        return out

    def _turn(
        self, module: Module, b: np.ndarray, a: np.ndarray, facts: Facts, client: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.kind == "scale":
            return b * self.gain, a / self.gain
        if module.core is not None:
            raise ShoalError(f"attack.kind=rotation needs modules without a core between B and A. {_WAY_OUT}")
        draw = generator(facts.seed, "attack", client, facts.round, "gauge", module.name)
        turn = np.linalg.qr(draw.normal(size=(len(a), len(a))))[0]
        return b @ turn, turn.T @ a


def _places(space: Space, name: str, client: int, columns: np.ndarray) -> np.ndarray:
    """Where the entries of the client's block of the tensor ``name`` are among ``columns``, in the block's shape."""
    block = np.arange(*space.spans[name]).reshape(space.shape(name))[space.block(name, client)]
    places = np.minimum(np.searchsorted(columns, block), len(columns) - 1)
    if not np.array_equal(columns[places], block):
        raise ShoalError(f"attack=gauge changes A and B together, and {name} does not train here. {_WAY_OUT}")
    return places
