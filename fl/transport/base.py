"""What carries vectors between peers: a node begins a round, sends to its peers' neighbours, and receives from them.

A message is named by (run, round, from, to). It is delivered once, to a node that has begun that round or will: what is
of an earlier round or comes again is dropped and counted. Nothing is promised: a message may be lost, and whoever waits
for it waits to its deadline. Neighbours on the same node exchange by memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from fl.errors import ShoalError

Heard = dict[int, np.ndarray | None]  # by sender; None: it takes no part in this round


class Address(NamedTuple):
    """Where a node listens for peers, and the name in its certificate (empty without TLS)."""

    host: str
    port: int
    name: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port} {self.name}".rstrip()

    @classmethod
    def of(cls, text: str) -> Address:
        """The address that is written as ``HOST:PORT NAME``. Raises `ShoalError`."""
        where, _, name = text.partition(" ")
        host, _, port = where.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ShoalError(f"{text!r:.80} is no address for peers; they are written as HOST:PORT.")
        return cls(host.strip("[]"), int(port), name)


@dataclass(frozen=True)
class Exchange:
    """A round as a node begins it.

    ``run`` are 16 bytes that name the run, more than those of every earlier start (a resume is another start); ``mine``
    the peers that live on this node; ``book`` where their neighbours live; a message has ``length`` numbers of the type
    ``dtype`` (float32 or float64).
    ``deadline`` is the time (`time.monotonic`) after which nothing is sent any more.
    """

    run: bytes
    round: int
    mine: frozenset[int]
    length: int
    deadline: float
    book: Mapping[int, Address] = field(default_factory=dict)
    dtype: str = "float32"


class PeerTransport(Protocol):
    """One node's way to its peers' neighbours."""

    @property
    def counts(self) -> Counter[str]:
        """What was dropped or refused, by reason."""

    def begin(self, exchange: Exchange) -> None:
        """Begin a round: messages of earlier ones are forgotten."""

    def send(self, round: int, src: int, dst: int, vector: np.ndarray | None) -> int:
        """Send ``vector`` (None: ``src`` takes no part in this round), which must not change afterwards.

        Returns at once, with the bytes of the message. Raises `ShoalError` for a receiver without an address.
        """

    def receive(self, round: int, dst: int, srcs: Iterable[int], deadline: float) -> Heard:
        """What ``srcs`` have sent to ``dst``, once all of it is here or at the time ``deadline`` (monotonic)."""

    def close(self) -> None:
        """Let go of threads and sockets; what is on its way is lost."""
