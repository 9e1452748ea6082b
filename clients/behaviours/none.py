"""Every client does what it was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from clients.behaviours.base import Behaviour, ReplyFields
from fl.keys import Part


@dataclass(frozen=True)
class Honest(Behaviour):
    """No client misbehaves. Has no settings."""

    from_round: int = field(default=0, init=False)

    def affected(self, number: int, *key: Part) -> frozenset[int]:
        return frozenset()

    def apply(self, reply: ReplyFields, *key: Part) -> ReplyFields | None:
        return reply
