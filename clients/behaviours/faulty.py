"""Clients that break, not cheat: every kind of reply that a server has to survive without taking it in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from clients.behaviours.base import ReplyFields, SomeClients
from fl.config import setting
from fl.keys import Part, generator

_OVERSIZE = 16
_HUGE_NORM = 1e30
_HUGE_WEIGHT = 1_000_000_000


class InjectedCrash(RuntimeError):
    """What a client that was told to crash raises in the middle of its work."""


@dataclass(frozen=True)
class Faulty(SomeClients):
    """Affected clients fail in one way (one bad coordinate is enough to ruin a mean, and harder to notice than all).

    | kind          | the client's reply                                                                   |
    |---------------|--------------------------------------------------------------------------------------|
    | nan           | one drawn coordinate is NaN                                                          |
    | inf           | one drawn coordinate is plus or minus infinity                                       |
    | wrong_shape   | one coordinate is missing, under the right layout hash                               |
    | oversize      | 16 times as many coordinates as the layout has                                       |
    | huge_norm     | the update scaled to norm 1e30: finite, absurd                                       |
    | wrong_version | claims the version after the one that it was given                                   |
    | wrong_layout  | the hash of another layout                                                           |
    | crash         | raises `InjectedCrash`                                                               |
    | silent        | never replies                                                                        |
    | huge_weight   | claims a billion examples                                                            |
    | zero_weight   | claims no examples                                                                   |
    """

    kind: str = setting(
        "nan",
        choices=[
            *("nan", "inf", "wrong_shape", "oversize", "huge_norm", "wrong_version", "wrong_layout"),
            *("crash", "silent", "huge_weight", "zero_weight"),
        ],
        help="in which way the clients fail",
    )

    def apply(self, reply: ReplyFields, *key: Part) -> ReplyFields | None:
        if self.kind == "crash":
            raise InjectedCrash(f"client {reply.client} was told to crash in round {reply.round} (attack=faulty)")
        if self.kind == "silent":
            return None
        return _CHANGES[self.kind](reply, generator(*key, "faulty"))


def _spoil(reply: ReplyFields, at: int, value: float) -> ReplyFields:
    update = reply.update.copy()
    update[at] = value
    return replace(reply, update=update)


def _scale_up(update: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(update.astype(np.float64))
    direction = update / norm if norm > 0 else np.full_like(update, len(update) ** -0.5)
    return (direction * _HUGE_NORM).astype(np.float32)


_CHANGES: dict[str, Callable[[ReplyFields, np.random.Generator], ReplyFields]] = {
    "nan": lambda r, draw: _spoil(r, int(draw.integers(len(r.update))), np.nan),
    "inf": lambda r, draw: _spoil(r, int(draw.integers(len(r.update))), np.inf * draw.choice([-1, 1])),
    "wrong_shape": lambda r, draw: replace(r, update=r.update[:-1]),
    "oversize": lambda r, draw: replace(r, update=np.tile(r.update, _OVERSIZE)),
    "huge_norm": lambda r, draw: replace(r, update=_scale_up(r.update)),
    "wrong_version": lambda r, draw: replace(r, version=r.version + 1),
    "wrong_layout": lambda r, draw: replace(r, layout=("0" if r.layout[:1] != "0" else "1") + r.layout[1:]),
    "huge_weight": lambda r, draw: replace(r, examples=_HUGE_WEIGHT),
    "zero_weight": lambda r, draw: replace(r, examples=0),
}
