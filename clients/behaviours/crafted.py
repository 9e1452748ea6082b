"""Clients that train honestly and then send another vector, made from what they see of the updates.

What hostile clients see is their ``knowledge``: *omniscient* ones see the honest updates of the round, *partial* ones
the updates that they would have sent themselves. Those that act alone see their own. Under a server a vector is an
update; among peers it is a whole model after the local step, and the same formulas apply.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from clients.behaviours.base import Facts, ReplyFields, RobustRule, Scene, SomeClients
from fl.config import setting
from fl.errors import ConfigError, ShoalError

EVALUATIONS, EXPAND, CONTRACT = 16, 2.0, 0.8


@dataclass(frozen=True)
class Crafted(SomeClients):
    """An attack that is one function of vectors. As it stands here, each hostile client acts alone."""

    crafts: ClassVar[bool] = True

    @abstractmethod
    def vectors(self, seen: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        """``(f, d)``, or ``(d,)`` for all alike, from what hostile clients see ``(k, d)`` and their own ``(f, d)``."""

    def seen(self, honest: np.ndarray, own: np.ndarray) -> np.ndarray:
        """The rows that hostile clients know."""
        return own

    def craft(self, honest: np.ndarray, own: np.ndarray, facts: Facts) -> np.ndarray:
        """``(f, d)`` float64: what hostile clients send instead of ``own`` ``(f, d)``, beside ``honest`` ``(h, d)``.

        Inputs are left as they are. Raises `ShoalError` where the attack is not defined on them.
        """
        if len(own) != len(facts.hostile) or len(honest) != len(facts.honest):
            raise ValueError("every row of own and honest is a client's, named by facts.hostile and facts.honest")
        if not len(own):
            return own.astype(np.float64)
        found = self.vectors(self.seen(honest, own), own, facts)
        return np.array(np.broadcast_to(found, own.shape), np.float64)

    def replies(
        self, honest: Sequence[ReplyFields], affected: frozenset[int], scene: Scene
    ) -> list[ReplyFields | Exception | None]:
        out: list[ReplyFields | Exception | None] = list(honest)
        hostile = [i for i, reply in enumerate(honest) if self.hostile(reply, affected)]
        others = [honest[i].update for i in range(len(honest)) if i not in set(hostile)] if self.colludes else []
        groups = [hostile] if self.colludes and hostile else [[i] for i in hostile]
        for group in groups:
            try:
                made = self._crafted([honest[i] for i in group], others, scene, honest)
                for i, vector in zip(group, made, strict=True):
                    out[i] = replace(honest[i], update=vector.astype(honest[i].update.dtype))
            except Exception as error:
                out = [error if i in group else said for i, said in enumerate(out)]
        return out

    def _crafted(
        self, mine: Sequence[ReplyFields], others: list[np.ndarray], scene: Scene, honest: Sequence[ReplyFields]
    ) -> np.ndarray:
        names = [reply.client for reply in mine]
        starts = [scene.starts[c] for c in names if c in scene.starts]
        facts = Facts(
            scene.seed,
            mine[0].round,
            names,
            [reply.client for reply in honest if reply.client not in set(names)] if others else [],
            starts=np.stack(starts) if len(starts) == len(names) and len({len(s) for s in starts}) == 1 else None,
            rule=scene.rule,
            space=scene.space,
            columns=scene.columns.get(names[0]),
        )
        own = self.stack([reply.update for reply in mine])
        return self.craft(self.stack(others) if others else own[:0], own, facts)

    def stack(self, vectors: list[np.ndarray]) -> np.ndarray:
        """``(n, d)``. Raises `ShoalError` where they differ in length, as those of clients of other ranks do."""
        if len({len(vector) for vector in vectors}) > 1:
            raise ShoalError(
                f"{type(self).__name__} is made of updates of one length; these clients train different tensors. "
                "Give all clients one adapter.rank, or use an attack that acts alone (sign_flip, gaussian, gauge)."
            )
        return np.stack(vectors)


@dataclass(frozen=True)
class Colluding(Crafted):
    """Hostile clients that put together what they know and, unless said otherwise, all send the same vector."""

    knowledge: str = setting(
        "omniscient",
        choices=["omniscient", "partial"],
        help="what they see: the round's honest updates, or those that they would have sent themselves",
    )

    @property
    def colludes(self) -> bool:
        return True

    def seen(self, honest: np.ndarray, own: np.ndarray) -> np.ndarray:
        rows = honest if self.knowledge == "omniscient" else own
        if not len(rows):
            raise ShoalError(
                f"{type(self).__name__} with attack.knowledge=omniscient needs an honest update in the round; all "
                "clients asked are hostile. Lower attack.fraction, or set attack.knowledge=partial."
            )
        return rows


@dataclass(frozen=True)
class Searching(Colluding):
    """A colluding attack ``mu + t p`` whose size t can be searched for against the defender's rule."""

    optimise: bool = setting(False, help="search the size that moves the defender's rule furthest from the honest mean")

    def __post_init__(self) -> None:
        if self.optimise and self.knowledge != "omniscient":
            allowed = "omniscient with attack.optimise=true: the search runs the defender's rule on the honest updates"
            raise ConfigError("attack.knowledge", self.knowledge, allowed, "Or set attack.optimise=false.")

    @property
    def needs_rule(self) -> bool:
        return self.optimise

    def searched(self, seen: np.ndarray, direction: np.ndarray, facts: Facts) -> np.ndarray:
        """``mu + t direction`` ``(d,)`` with the t >= 0 that `line_search` finds to move ``facts.rule`` furthest."""
        if facts.rule is None:
            raise ShoalError(
                "attack.optimise=true searches against the server's rule, and this run has none that it can ask. "
                "Set attack.optimise=false, or choose a rule with aggregator.combine."
            )
        mean = average(seen)

        def displacement(size: float) -> float:
            rows = np.concatenate(
                [seen, np.tile((mean + size * direction).astype(seen.dtype), (len(facts.hostile), 1))]
            )
            gap = np.asarray(ask(facts.rule, rows), np.float64) - mean
            return float(gap @ gap)

        return mean + line_search(displacement) * direction


def ask(rule: RobustRule | None, rows: np.ndarray) -> np.ndarray:
    assert rule is not None
    return rule(rows)


def average(rows: np.ndarray) -> np.ndarray:
    """``mu`` ``(d,)`` float64."""
    return rows.mean(axis=0, dtype=np.float64)


def deviation(rows: np.ndarray) -> np.ndarray:
    """The standard deviation of each coordinate ``(d,)`` float64, with n - 1. Raises `ShoalError` for one row."""
    if len(rows) < 2:
        raise ShoalError(
            "The attack needs the spread of at least two updates, and its clients see one. Set "
            "attack.knowledge=omniscient, or let more clients collude (attack.fraction, attack.clients)."
        )
    return rows.std(axis=0, ddof=1, dtype=np.float64)


def line_search(value, evaluations: int = EVALUATIONS) -> float:
    """A size t >= 0 with a large ``value(t)``, found in ``evaluations`` calls from t = 0 on.

    Steps away from the best size so far double from 1 on while that helps. Then proposals close in on the best size
    from either side, with steps that shrink by 0.8 (the search of MoNNA's experiments, arXiv 2209.10931).
    """
    best, most, step = 0.0, value(0.0), 1.0
    tried, expanding = best, True
    for _ in range(evaluations - 1):
        if expanding:
            tried = best + step
        elif tried < best:
            tried += step
        else:
            lower = tried - step
            while lower < 0:  # halfway back instead of below zero
                lower = (lower + tried) / 2
            tried = lower
        found = value(tried)
        better = found > most
        if better:
            best, most = tried, found
        expanding = expanding and better
        step *= EXPAND if expanding else CONTRACT
    return best
