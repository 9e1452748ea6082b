"""Which Flower node holds which client, as nodes come, go and come back.

A node is asked once who it is (`fl.engine.session.Session.hello`): its version of Shoal, the clients that it hosts, and
how many samples of its own they have. One that left the SuperLink's list and is in it again is asked anew. The first
node that says that it hosts a client has it until it is gone; another one that says so too is turned away by name, and
so is one of another version.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fl.engine.carried import PROTOCOL, Note, version
from fl.engine.home import Charges
from fl.errors import RunStopped, ShoalError
from fl.transport.base import Address

log = logging.getLogger("shoal.server")
HELLO = "query.hello"
LOOK_S, PATIENT_S = 0.2, 1.0
AGAIN_S = 60.0  # after which a node that was refused, or has not answered, is asked anew
MOST = 2**31 - 1  # samples of a client


@dataclass(frozen=True)
class Told:
    """What a node said: its clients, how many samples of their own (train, test), and where it listens for others."""

    clients: tuple[int, ...]
    samples: dict[int, tuple[int, int]]
    peer: Address | None


@dataclass
class Directory:
    """The nodes behind ``grid`` for a run of ``number`` clients; ``first`` is the note of its messages."""

    grid: Grid
    number: int
    first: Note
    say: Callable[[str], None] = log.info
    nodes: dict[int, Told] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    charges: Charges | None = None  # where a privacy claim needs them
    patience_s: float = 0.0
    begun: bool = False  # all clients have been there
    _asked: dict[str, tuple[int, float]] = field(default_factory=dict)  # hellos on their way: the node, and since when
    _there: dict[int, str] = field(default_factory=dict)  # the nodes that are connected, and since when each is
    _tried: float = field(default_factory=time.monotonic)  # when the refused were asked last

    def node(self, client: int) -> int | None:
        return next((n for n, told in self.nodes.items() if client in told.clients and n in self._there), None)

    def present(self) -> list[int]:
        """The clients whose nodes are there. Once a run goes on, waits for one of them, ``patience_s`` at most: with
        nobody there, nothing is missed."""
        end = None
        while True:
            self.look()
            there = sorted({c for n, told in self.nodes.items() if n in self._there for c in told.clients})
            if there or not self.begun:
                return there
            end = time.monotonic() + self.patience_s if end is None else end
            if time.monotonic() >= end:
                return []
            time.sleep(PATIENT_S)

    def stay(self, node: int) -> str | None:
        return self._there.get(node)

    def note(self, clients: Sequence[int]) -> dict[str, Any]:
        heard = {} if self.charges is None else self.charges.answered
        answered = {str(c): heard[c] for c in clients if c in heard}
        return replace(self.first, nodes=max(1, len(self.nodes)), answered=answered).plain()

    def book(self) -> dict[int, Address]:
        return {c: told.peer for told in self.nodes.values() if told.peer is not None for c in told.clients}

    def leaving(self) -> None:
        if self.charges is not None:
            self.charges.save()

    def heard(self, client: int, job: int) -> None:
        if self.charges is not None:
            self.charges.heard(client, job)

    def samples(self) -> dict[int, tuple[int, int]]:
        """How many samples of their own (train, test) clients have, as their nodes told."""
        return {c: sizes for told in self.nodes.values() for c, sizes in told.samples.items()}

    def look(self) -> None:
        """Ask the nodes that have come who they are, take in what they answer, and forget those that are gone."""
        before, self._there, now = self._there, _connected(self.grid), time.monotonic()
        gone = [n for n in self.nodes if self._there.get(n) != before.get(n)]  # it may be back already
        for node in gone:
            self.say(f"Node {node} is gone, with clients {_ranges(self.nodes.pop(node).clients)}.")
        if gone or now - self._tried > AGAIN_S:  # what was refused may be right now
            self.refused, self._tried = {}, now
        self.refused = {n: why for n, why in self.refused.items() if n in self._there}
        self._asked = {m: (n, t) for m, (n, t) in self._asked.items() if n in self._there and now - t < AGAIN_S}
        known = {*self.nodes, *self.refused, *(n for n, _ in self._asked.values())}
        new = sorted(n for n in self._there if n not in known)
        if new:
            note = {k: v for k, v in self.first.plain().items() if k != "answered"}
            messages = [Message(RecordDict({"note": ConfigRecord(note)}), n, HELLO) for n in new]
            ids = list(self.grid.push_messages(messages))
            self._asked |= {message_id: (n, now) for message_id, n in zip(ids, new) if message_id}
        for reply in self.grid.pull_messages(list(self._asked)) if self._asked else []:
            asked = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None:
                self._take(asked[0], reply)

    def _take(self, node: int, reply: Message) -> None:
        """What ``reply`` says of ``node``. It may hold anything."""
        try:
            if reply.has_error():
                raise ValueError(f"it answered with an error: {reply.error.reason!s:.500}")
            said = reply.content["hello"]
            assert isinstance(said, ConfigRecord)
            if said.get("protocol") != PROTOCOL or said.get("shoal") != version():
                there = f"Shoal {said.get('shoal')!s:.20} (messages {said.get('protocol')!s:.20})"
                raise ValueError(f"it runs {there}; this server runs Shoal {version()} (messages {PROTOCOL})")
            if said.get("refused"):
                raise ValueError(str(said["refused"])[:500])
            clients = tuple(_numbers(said, "clients"))
            if not clients or any(not 0 <= c < self.number for c in clients):
                raise ValueError(f"it hosts clients {_ranges(clients)}; the experiment has 0 to {self.number - 1}")
            taken = sorted({c for told in self.nodes.values() for c in told.clients} & set(clients))
            if taken:
                raise ValueError(f"it hosts client {taken[0]}, which node {self.node(taken[0])} hosts already")
            train, test = _numbers(said, "train"), _numbers(said, "test")
            sizes = dict(zip(clients, zip(train, test, strict=True), strict=True)) if train else {}
            if any(not 1 <= n <= MOST for n in train) or any(n > MOST for n in test):
                raise ValueError(f"it tells numbers of samples that are none: {[*train, *test]!r:.100}")
            peer = str(said.get("peer", ""))[:300]
            self.nodes[node] = Told(clients, sizes, Address.of(peer) if peer else None)
            self.say(f"Node {node} is here, with clients {_ranges(clients)}.")
        except Exception as error:  # the node decides what is in it, so anything may break
            named = isinstance(error, ValueError | ShoalError)
            why = str(error) if named else f"it can't be understood ({type(error).__name__})"
            self.refused[node] = why
            self.say(f"Node {node} takes no part: {why}.")

    def wait(self, seconds: float) -> None:
        """Wait until every client is there. Raises `RunStopped` after ``seconds``."""
        end, pause_s = time.monotonic() + seconds, LOOK_S
        while len(there := self.present()) < self.number:
            if time.monotonic() >= end:
                missing = [c for c in range(self.number) if c not in there]
                why = "".join(f" Node {n} takes no part: {w}." for n, w in self.refused.items())
                raise RunStopped(
                    f"No node holds clients {_ranges(missing)} after {seconds:g} s (engine.wait_s); "
                    f"{len(self._there)} nodes are connected.{why} Start them with `shoal node` and run again."
                )
            time.sleep(min(pause_s, max(0.0, end - time.monotonic())))
            pause_s = min(PATIENT_S, 1.5 * pause_s)
        self.begun, self.patience_s = True, seconds


def _connected(grid: Grid) -> dict[int, str]:
    """The nodes that are connected, and since when each is, where the grid knows."""
    nodes = getattr(grid, "get_nodes", None)
    if nodes is None:
        return dict.fromkeys(grid.get_node_ids(), "")
    return {n.node_id: str(n.last_activated_at) for n in nodes()}


def _numbers(said: ConfigRecord, name: str) -> list[int]:
    found = said.get(name)
    if not isinstance(found, list) or any(type(x) is not int or x < 0 for x in found):
        raise ValueError(f"its {name} are no numbers: {found!r:.100}")
    return [x for x in found if isinstance(x, int)]


def _ranges(numbers: tuple[int, ...] | list[int]) -> str:
    """``0-2, 5`` for (0, 1, 2, 5)."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
