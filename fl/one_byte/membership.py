"""Who is a peer in which round: those who join and leave, by plan."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fl.errors import ConfigError

HOW = ("replay", "snapshot")
LEAVE = "leave"


@dataclass(frozen=True)
class Membership:
    """``changes`` are (peer, round, what), rising: from that round on the peer is there, by `HOW`, or has left.

    A peer whose first change is a join is not there before it; everybody else is there from round 1.
    """

    changes: tuple[tuple[int, int, str], ...] = ()

    @classmethod
    def of(cls, joins: Sequence[Sequence[Any]] | None, leaves: Sequence[Sequence[Any]] | None) -> Membership:
        """From settings. Raises `ConfigError` for rows of another form, and where a peer joins or leaves twice over."""
        changes: list[tuple[int, int, str]] = []
        forms = {"joins": "[round, peer, replay or snapshot]", "leaves": "[round, peer]"}
        for key, rows in (("joins", joins), ("leaves", leaves)):
            for row in rows or ():
                whole = len(row) >= 2 and all(type(value) is int for value in row[:2]) and row[0] > 1 and row[1] >= 0
                if not whole or not (len(row) == 3 and row[2] in HOW if key == "joins" else len(row) == 2):
                    raise ConfigError(f"schedule.{key}", list(row), f"{forms[key]}, rounds from 2 and peers from 0")
                changes.append((row[1], row[0], row[2] if key == "joins" else LEAVE))
        changes.sort()
        for (peer, round, what), (same, again, then) in itertools.pairwise(changes):
            if peer == same and (round == again or (what == LEAVE) == (then == LEAVE)):
                allowed = f"joins and leaves in turn, in different rounds: peer {peer} has {what} in round {round}"
                raise ConfigError(f"schedule.{'leaves' if then == LEAVE else 'joins'}", [again, same], allowed)
        return cls(tuple(changes))

    def check(self, number: int) -> None:
        """Raise `ConfigError` where a peer is none of the ``number``, or some round has nobody."""
        for peer, round, what in self.changes:
            if peer >= number:
                key = "leaves" if what == LEAVE else "joins"
                raise ConfigError(f"schedule.{key}", [round, peer], f"peers 0 to {number - 1}")
        for round in sorted({1, *(round for _, round, _ in self.changes)}):
            if not self.at(round, number):
                raise ConfigError("schedule.leaves", round, "somebody who is there in every round")

    def at(self, round: int, number: int) -> list[int]:
        """The peers of ``round``, rising."""
        return [peer for peer in range(number) if self._there(peer, round)]

    def _there(self, peer: int, round: int) -> bool:
        own = [(since, what) for p, since, what in self.changes if p == peer]
        if not own:
            return True
        past = [what for since, what in own if since <= round]
        return past[-1] != LEAVE if past else own[0][1] == LEAVE

    def how(self, peer: int, since: int, round: int) -> str | None:
        """How ``peer`` joined last, in a round after ``since`` and up to ``round``; None: it did not."""
        found = [what for p, r, what in self.changes if p == peer and since < r <= round and what != LEAVE]
        return found[-1] if found else None
