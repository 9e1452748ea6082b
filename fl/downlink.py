"""What a client is sent: the part of the server's state that it does not hold yet.

A state has groups of tensors (`clients.adapters.space.Space`) and a change of the base. Where clients keep what they
were sent (a frozen A, last round's other factor, a changed base), a request carries

* the groups that have changed since the version that the client is known to hold: all of them at first contact, and
* the increments of the base since then, or the whole change where that takes fewer numbers.

A client is known to hold a version once it has answered a request for it. One that answered and was not heard holds
more than it is known to: it gets the same again, which changes nothing (see `Holdings`).

Where everything trains in every round and the base stays, all of that is everything, every time, and nothing is kept.

The header of a request says what its vector holds: ``extra.train`` (the groups that train), ``extra.sent`` (those in
the vector, in the order of the layout), ``extra.known`` (the version it builds on, -1: none; absent: nothing is to be
kept) and ``extra.base``: ``=R`` for a whole change of ranks R, or ``V:R|V:R`` for the increments of versions V, where R
are the ranks of the modules' factors (0: no change, -1: a matrix), separated by commas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clients.adapters.base_change import Change, grow, numbers, packed_size
from clients.adapters.space import Space
from fl.messages import MalformedMessage, Scalar, freeze
from fl.state import ServerState


@dataclass
class Downlink:
    """The server's side: what each client holds, and what it is sent. ``keeps``: whether clients keep anything."""

    space: Space
    keeps: bool
    own: bool = False  # whether every client is sent a state of its own, so that nothing is shared
    known: dict[int, int] = field(default_factory=dict)  # client -> version
    changed: dict[str, int] = field(default_factory=dict)  # group -> version of its last change
    base_changed: int = 0  # version of the base's last change
    log: dict[int, Change] = field(default_factory=dict)  # version -> what it added to the base
    floor: int = 0  # the log is complete from the version after this
    _made: dict[tuple, tuple[np.ndarray, str, str]] = field(default_factory=dict)  # see `_content`

    def note(self, old: ServerState, new: ServerState, increment: Change) -> None:
        """``new`` follows ``old``, with ``increment`` added to its base."""
        self._made.clear()
        if not self.keeps:
            return
        for group in self.space.names:
            columns = self.space.columns((group,))
            if not np.array_equal(old.vector[columns], new.vector[columns]):
                self.changed[group] = new.version
        if increment:
            self.log[new.version], self.base_changed = increment, new.version
        # Pieces that take more than the whole, or that everybody has, are not sent again.
        oldest = min(self.known.values(), default=new.version)
        whole, since = numbers(new.base), 0
        for version in sorted(self.log, reverse=True):
            since += numbers(self.log[version])
            if version <= oldest or since > whole:
                del self.log[version]
                self.floor = max(self.floor, version)

    def heard(self, client: int, version: int) -> None:
        """``client`` has answered a request for ``version``, so it holds that."""
        if self.keeps:
            self.known[client] = max(version, self.known.get(client, version))

    def request(
        self, server: ServerState, client: int, train: tuple[str, ...] | None
    ) -> tuple[np.ndarray, dict[str, Scalar]]:
        """The vector and the header's values for ``client``; requests with the same content share its bytes.

        ``train`` are the groups that train (None: an evaluation).
        """
        known = self.known.get(client) if self.keeps else None
        key = (server.version, self.space.kind(client), known)
        made = None if self.own else self._made.get(key)
        if made is None:
            made = self._content(server, client, known)
            if not self.own:
                self._made[key] = made
        vector, sent, base = made
        header: dict[str, Scalar] = {"sent": sent}
        if train is not None:
            header["train"] = ",".join(train)
        if self.keeps:
            header["known"] = -1 if known is None else known
        if base:
            header["base"] = base
        return vector, header

    def _content(self, server: ServerState, client: int, known: int | None) -> tuple[np.ndarray, str, str]:
        """The vector for a client that holds the version ``known``, and what the header says is in it."""
        sent = [g for g in self.space.names if known is None or self.changed.get(g, 0) > known]
        pieces, base = self._base(server, known)
        vector = freeze(np.concatenate([self.space.take(server.vector, sent, client), *pieces]))
        return vector, ",".join(sent), base

    def _base(self, server: ServerState, known: int | None) -> tuple[list[np.ndarray], str]:
        if not server.base or (known is not None and known >= self.base_changed):
            return [], ""
        if known is not None and known >= self.floor:
            packed = [(v, *self.space.pack(self.log[v])) for v in sorted(self.log) if v > known]
            if sum(len(p) for _, p, _ in packed) < numbers(server.base):
                return [p for _, p, _ in packed], "|".join(f"{v}:{_text(ranks)}" for v, _, ranks in packed)
        whole, ranks = self.space.pack(server.base)
        return [whole], f"={_text(ranks)}"

    def once(self, server: ServerState, client: int, train: tuple[str, ...], header: Mapping[str, Scalar]) -> int:
        """Bytes of a request that only a first contact costs: groups that don't train in this round, and the change of
        the base that the adapter began with."""
        if header.get("known") != -1:
            return 0
        start = numbers(server.base) if self.base_changed == 0 else 0
        return 4 * (start + sum(len(self.space.columns((g,), client)) for g in self.space.names if g not in train))

    def parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """For a checkpoint: arrays and plain values, undone by `restore`."""
        packed = {v: self.space.pack(change) for v, change in self.log.items()}
        arrays = {f"downlink/{v}": array for v, (array, _) in packed.items()}
        meta = {
            "known": {str(c): v for c, v in self.known.items()},
            "changed": dict(self.changed),
            "log": {str(v): ranks for v, (_, ranks) in packed.items()},
            "base_changed": self.base_changed,
            "floor": self.floor,
        }
        return arrays, meta

    def restore(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self.known = {int(c): v for c, v in meta["known"].items()}
        self.changed = dict(meta["changed"])
        self.base_changed, self.floor = meta["base_changed"], meta["floor"]
        self.log = {int(v): self.space.unpack(arrays[f"downlink/{v}"], ranks) for v, ranks in meta["log"].items()}
        self._made.clear()


def _text(ranks: Iterable[int]) -> str:
    return ",".join(map(str, ranks))


@dataclass
class Holdings:
    """The node's side: what its clients hold. States are kept once for all clients that hold the same."""

    space: Space
    held: dict[int, int] = field(default_factory=dict)  # client -> version
    states: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # (version, kind of client) -> own columns
    bases: dict[int, Change] = field(default_factory=dict)  # version -> change of the base

    def open(
        self, client: int, version: int, vector: np.ndarray, header: Mapping[str, Scalar]
    ) -> tuple[np.ndarray, tuple[str, ...], Change]:
        """What a request for ``version`` stands for: the state that ``client`` holds now ``(n,)``, its own columns in
        its own scale; the groups that train; and the change of the base.

        A training request of which anything is to be kept is remembered. Raises `MalformedMessage` where the request
        does not fit what the client holds.
        """
        sent, train = _groups(header, "sent", self.space), _groups(header, "train", self.space)
        keep = header.get("known")
        kind = self.space.kind(client)
        have = self.held.get(client)
        if keep is not None and (not isinstance(keep, int) or (keep >= 0 and (have is None or have < keep))):
            raise MalformedMessage("schema", f"client {client} does not hold version {keep!r:.20}, which is built on")
        if keep is not None and have is not None and have > version:
            # A message that comes again late: what it left out can't be known any more.
            raise MalformedMessage("schema", f"client {client} holds version {have} already, which is newer")
        size = len(self.space.columns(sent, client))
        if len(vector) < size:
            raise MalformedMessage("shape", f"{len(vector)} numbers; {size} are needed for {', '.join(sent)}")
        base = self.bases.get(version)
        if base is None:
            base = self._base(have if keep is not None and keep != -1 else None, vector[size:], header.get("base", ""))
        state = self._state(client, sent, vector[:size], have)
        if keep is not None and "train" in header:
            # A message that comes twice finds what it brought the first time.
            state = self.states.setdefault((version, kind), state)
            base = self.bases.setdefault(version, base)
            self.held[client] = version
            used = {(v, self.space.kind(c)) for c, v in self.held.items()}
            self.states = {k: s for k, s in self.states.items() if k in used}
            self.bases = {v: b for v, b in self.bases.items() if v in {v for v, _ in used}}
        return state, train, base

    def _state(self, client: int, sent: tuple[str, ...], vector: np.ndarray, have: int | None) -> np.ndarray:
        if set(sent) == set(self.space.names):
            return vector
        if have is None:
            raise MalformedMessage("schema", f"client {client} holds nothing yet, and not all groups were sent")
        state = self.states[have, self.space.kind(client)].copy()
        own = self.space.columns(None, client)
        state[np.searchsorted(own, self.space.columns(sent, client))] = vector
        return state

    def _base(self, have: int | None, vector: np.ndarray, described: Scalar) -> Change:
        sizes = [self.space.sizes(m) for m in self.space.modules]
        total: Change = self.bases.get(have, {}) if have is not None else {}
        at = 0
        try:
            for part in str(described).split("|") if described else []:
                version, _, text = part.partition("=") if part.startswith("=") else part.partition(":")
                ranks = [int(r) for r in text.split(",")]
                if len(ranks) != len(sizes) or min(ranks) < -1:
                    raise ValueError(f"{len(ranks)} ranks for {len(sizes)} modules")
                size = packed_size(ranks, sizes)
                change = self.space.unpack(vector[at : at + size], ranks)
                at += size
                if not version:
                    total = change
                elif have is None or int(version) > have:
                    total = grow(total, change)
            if at != len(vector):
                raise ValueError(f"{len(vector) - at} numbers are left over")
        except ValueError as error:
            raise MalformedMessage("schema", f"the change of the base can't be read ({error})") from error
        return total

    def parts(self, client: int | None = None) -> dict[str, np.ndarray]:
        """For a checkpoint: named arrays, undone by `restore`; of one ``client`` alone, or all."""
        held = {c: v for c, v in self.held.items() if client in (None, c)}
        used = {(v, self.space.kind(c)) for c, v in held.items()}
        arrays = {f"holdings/state/{v}/{kind}": s for (v, kind), s in self.states.items() if (v, kind) in used}
        for version, change in self.bases.items():
            if version not in held.values():
                continue
            packed, ranks = self.space.pack(change)
            arrays[f"holdings/base/{version}"] = packed
            arrays[f"holdings/ranks/{version}"] = np.array(ranks, np.int64)
        if held:
            arrays["holdings/held"] = np.array(sorted(held.items()), np.int64)
        return arrays

    def restore(self, arrays: Mapping[str, np.ndarray], client: int | None = None) -> None:
        """Undo `parts`; other arrays are ignored, and so is what others hold, of one ``client``."""
        if client is None:
            self.held, self.states, self.bases = {}, {}, {}
        else:
            self.held.pop(client, None)
        self.held |= {int(c): int(v) for c, v in arrays.get("holdings/held", np.zeros((0, 2)))}
        for path, array in arrays.items():
            kind, _, rest = path.removeprefix("holdings/").partition("/")
            if not path.startswith("holdings/"):
                continue
            if kind == "state":
                version, _, of = rest.partition("/")
                self.states[int(version), int(of)] = array
            elif kind == "base":
                ranks = arrays[f"holdings/ranks/{rest}"].tolist()
                self.bases[int(rest)] = self.space.unpack(array, ranks)


def _groups(header: Mapping[str, Scalar], name: str, space: Space) -> tuple[str, ...]:
    text = header.get(name, "")
    found = tuple(str(text).split(",")) if text else ()
    if unknown := set(found) - set(space.names):
        raise MalformedMessage("schema", f"this adapter has no tensors {sorted(unknown)[0]!r:.40}")
    return found
