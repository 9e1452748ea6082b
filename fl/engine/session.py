"""A place where clients train: answers the messages of Flower's runs for the clients that it hosts.

The same object answers on a resident node (`fl.engine.resident`), in a stock SuperNode's process, which lives for one
message, and in a Ray worker, which may be given any node's message. So what clients keep lies on disk, by run and
client (`fl.engine.kept`): it is read before a message is answered where another process has written it since, and
written before the reply leaves. Model, data and tokens stay loaded for as long as the process lives.

Only code that is installed here runs; a message brings settings and numbers.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fl.engine import home
from fl.engine.carried import OURS, PROTOCOL, Note, carried, check_foreign, check_note, version
from fl.engine.cohort_grid import client_of, cohort_app
from fl.engine.kept import HomeError, Kept, forget, secret
from fl.engine.settings import SuperLink
from fl.errors import ShoalError
from fl.experiment import Experiment, Settings, Shared
from fl.keys import key_bytes
from fl.trackers.none import NoTracker
from fl.transport.sockets import Sockets

log = logging.getLogger("shoal.node")
HELLO = "hello"
SITES = 4  # runs that stay loaded
MOST_NODES = 1000  # that a node paces its polling by, whatever a server tells
KEPT_DAYS = 60  # what clients keep of a run is deleted when it was not written to for so long

R = TypeVar("R")


@dataclass(frozen=True)
class Place:
    """One machine's part: where it keeps what its clients remember, which clients it hosts, and its own settings.

    ``clients`` None: those whose number leaves the remainder ``partition-id`` when divided by ``num-partitions`` (the
    node config of Flower's own tutorials). ``data`` are files of the clients' own samples, one a client in the order of
    ``clients``; ``engine`` replaces ``engine.*`` settings (device, threads ...); ``transport`` listens for other nodes'
    peers. Of code and files that a server's settings name, those of ``packages`` and in ``files`` are used, and no
    others. ``own`` says whether noise is keyed by a secret of this place.
    """

    folder: Path
    clients: tuple[int, ...] | None = None
    data: tuple[Path, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)
    transport: Sockets | None = None
    packages: tuple[str, ...] = OURS
    files: tuple[Path, ...] = (Path("."),)
    own: bool = True

    @classmethod
    def of_node(cls, config: Mapping[str, Any]) -> Place:
        """The place that a stock SuperNode's ``--node-config`` describes: ``clients="0-3,6"`` or partition-id and
        num-partitions, ``state``, ``data``, ``files``, ``allow`` (separated by ``:``), ``device``. Raises `ShoalError`.
        """
        from fl.hosts.clients import parse_clients

        chosen, number = str(config.get("clients", "")), config.get("partition-id", 0)
        folder = Path(str(config.get("state", "") or Path(".shoal") / f"node-{number}"))

        def parts(name: str, default: str = "") -> list[str]:
            return [part for part in str(config.get(name, default)).split(os.pathsep) if part]

        return cls(
            folder,
            parse_clients(chosen) if chosen else None,
            tuple(Path(part) for part in parts("data")),
            {name: config[name] for name in ("device", "threads", "cohort_size") if name in config},
            packages=(*OURS, *parts("allow")),
            files=tuple(Path(part) for part in parts("files", ".")),
        )

    def hosts(self, config: Mapping[str, Any], number: int) -> tuple[int, ...]:
        """The clients of ``number`` that live here. Raises `ShoalError`."""
        if self.clients is None:
            part, parts = int(config.get("partition-id", 0)), int(config.get("num-partitions", 1))
            return tuple(range(part, number, parts))
        if beyond := [c for c in self.clients if c >= number]:
            raise ShoalError(f"this node hosts client {beyond[0]}, and the experiment has clients 0 to {number - 1}")
        return self.clients


class Site:
    """One run at a place: its experiment, loaded, and what its clients keep."""

    def __init__(self, place: Place, clients: tuple[int, ...], settings: Settings, note: Note, shared: Shared):
        engine = replace(settings.engine, **place.engine)
        self.settings = replace(settings, engine=engine)
        self.experiment = Experiment(self.settings, shared, log.info, hosted=len(clients))
        self.experiment.samples = home.at_node(self.settings, clients, place.data, note.labels)
        self.experiment.transport = place.transport
        self.kept = Kept(place.folder, note.run)
        if place.own:
            self.experiment.secret = key_bytes(secret(place.folder).hex(), note.run)
        self.node = self.experiment.node
        self.node.sizes_hidden = home.sizes_hidden(self.settings)

    def read(self, client: int, answered: int) -> None:
        """Take up what ``client`` has kept, where another process wrote it. Raises `ShoalError`."""
        guard = self.experiment.guard
        if self.kept.newer(client):
            found = self.kept.load(client)
            arrays, meta = ({}, {}) if found is None else found
            if found is not None:
                home.check_kind(guard, client, meta.get("privacy", {}))
            self.node.restore_client(client, arrays)
            guard.restore_client(client, meta.get("privacy", {}))
        home.check_books(guard, client, answered)

    def write(self, client: int) -> None:
        """Put on disk what ``client``, which was read before, keeps. Raises `ShoalError`; it is read anew then."""
        arrays, books = self.node.client_arrays(client), self.experiment.guard.client_state(client)
        if arrays or books or self.kept.holds(client):
            self.kept.save(client, arrays, {"privacy": books})

    def close(self) -> None:
        self.experiment.close()


class Session:
    """Answers Flower's messages at one place. ``place`` None: the node config says it. ``resolved`` are the settings,
    where Flower's run config does not carry them (Ray)."""

    def __init__(
        self,
        place: Place | None = None,
        resolved: Mapping[str, Any] | None = None,
        paced: Callable[[int], None] = lambda nodes: None,
    ):
        self.place, self.resolved, self.paced, self.resident = place, resolved, paced, place is not None
        self.shared = Shared()
        self.sites: OrderedDict[tuple[str, str], Site] = OrderedDict()
        self._configs: OrderedDict[int, tuple[dict[str, Any], Settings]] = OrderedDict()
        self._site: Site | None = None
        self._note: Note | None = None
        self._hosts: tuple[int, ...] = ()

    def app(self) -> ClientApp:
        """The ClientApp of this place."""
        train, evaluate, query = _closed(self._train), _closed(self._evaluate), _closed(self._query)
        app = cohort_app(train, evaluate, query, enter=_closed(self._enter))
        app.query(HELLO)(_closed(self.hello))
        return app

    def close(self) -> None:
        for site in self.sites.values():
            site.close()
        self.sites.clear()
        if self.place is not None and self.place.transport is not None:
            self.place.transport.close()

    def hello(self, message: Message, context: Context) -> Message:
        """Who is here: the version of Shoal, the clients hosted, and of own samples how many there are."""
        place = self._placed(context)
        about: dict[str, Any] = {"shoal": version(), "protocol": PROTOCOL, "clients": [], "train": [], "test": []}
        about |= {"peer": "" if place.transport is None else str(place.transport.address), "refused": ""}
        try:
            asked = message.content["note"]
            assert isinstance(asked, ConfigRecord)
            resolved, settings = self._settings(context)
            note = check_note({**asked, "answered": {}}, resolved)
            clients = place.hosts(context.node_config, note.clients)
            self._pace(note)
            home.check_samples(settings, clients, place.data)
            about["clients"] = list(clients)
            if place.data:
                data = self._open(note, context).experiment.data
                about["train"], about["test"] = home.told(settings, data, clients)
        except ShoalError as error:
            log.error("%s", error)
            about["refused"] = str(error)[:1000]
        return Message(RecordDict({"hello": ConfigRecord(about)}), reply_to=message)

    def _placed(self, context: Context) -> Place:
        if self.place is None:
            self.place = Place.of_node(context.node_config)
        return self.place

    def _settings(self, context: Context) -> tuple[dict[str, Any], Settings]:
        """The run's settings, read and checked once."""
        if context.run_id not in self._configs:
            resolved = dict(self.resolved) if self.resolved is not None else carried(context.run_config)[0]
            place = self._placed(context)
            if self.resolved is None:
                unread = ("engine", "tracker", *(["data"] if place.data else []))
                check_foreign(resolved, place.packages, place.files, unread)
            settings = Settings.of(untracked(home.localised(resolved, place.data)))
            if isinstance(settings.engine, SuperLink):
                home.check_hosts(settings, self.resident)
            self._configs[context.run_id] = resolved, settings
            while len(self._configs) > SITES:
                self._configs.popitem(last=False)
        return self._configs[context.run_id]

    def _open(self, note: Note, context: Context) -> Site:
        place, (_, settings) = self._placed(context), self._settings(context)
        key = note.run, note.digest
        if key not in self.sites:
            torch.set_num_threads(1)
            for run in forget(place.folder, KEPT_DAYS):
                log.info("forgot run %s: nothing was written to it for %d days", run, KEPT_DAYS)
            clients = place.hosts(context.node_config, note.clients)
            self.sites[key] = Site(place, clients, settings, note, self.shared)
            while len(self.sites) > SITES:
                self.sites.popitem(last=False)[1].close()
        self.sites.move_to_end(key)
        return self.sites[key]

    def _enter(self, found: dict[str, Any], context: Context) -> None:
        """Before the messages of one Flower message are answered. Raises `ShoalError`."""
        note = check_note(found, self._settings(context)[0])
        self._pace(note)
        self._note, self._site = note, self._open(note, context)
        self._hosts = self._placed(context).hosts(context.node_config, note.clients)

    def _pace(self, note: Note) -> None:
        self.paced(max(1, min(note.nodes, MOST_NODES)))

    def _answer(
        self, messages: list[Message], answer: Callable[[Site, list[Message]], list[Message]], writes: bool
    ) -> list[Message]:
        """A reply to each message. What a client keeps may be lost, or not go to the disk: the others go on."""
        site, note = self._site, self._note
        assert site is not None and note is not None
        hosted = site.node.hosted = frozenset(self._hosts)  # a Ray worker answers for one node after the other
        clients = sorted({_client(m) for m in messages} & hosted)
        refused: dict[int, ShoalError] = {}

        def each(act: Callable[[int], None]) -> None:
            for client in [c for c in clients if c not in refused]:
                try:
                    act(client)
                except ShoalError as error:
                    if not isinstance(error, HomeError):  # which is in the log
                        log.error("%s", error)
                    site.kept.forget_read([client])  # what memory holds may be more than what was done
                    refused[client] = error

        try:
            each(lambda client: site.read(client, note.answered.get(str(client), 0)))
            going = [m for m in messages if _client(m) not in refused]
            replies = answer(site, going) if going else []
            if writes:
                each(site.write)
        except BaseException:
            site.kept.forget_read(clients)
            raise
        lost = [(m, refused[_client(m)]) for m in messages if _client(m) in refused]
        errors = {m.metadata.message_id: _error(error, m) for m, error in lost}
        return [r for r in replies if r.metadata.reply_to_message_id not in errors] + [*errors.values()]

    def _train(self, messages: list[Message], context: Context) -> list[Message]:
        return self._answer(messages, lambda site, some: site.node.train(some), True)

    def _evaluate(self, messages: list[Message], context: Context) -> list[Message]:
        size = self._site.settings.evaluation.batch_size if self._site is not None else 1
        return self._answer(messages, lambda site, some: site.node.evaluate(some, size), False)

    def _query(self, messages: list[Message], context: Context) -> list[Message]:
        return self._answer(messages, lambda site, some: site.node.query(some), True)


def untracked(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """``resolved`` without a tracker, which is the server's: a node does not need its package."""
    return {**resolved, "tracker": {"_target_": f"{NoTracker.__module__}.{NoTracker.__qualname__}"}}


def _client(message: Message) -> int:
    return client_of(message.metadata.dst_node_id)


def _error(error: ShoalError, message: Message) -> Message:
    reason = f"{type(error).__name__}: {error}"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _closed(handler: Callable[..., R]) -> Callable[..., R]:
    """``handler``, of whose failures only the types leave: Flower sends a text whole, and it could hold data."""

    @functools.wraps(handler)
    def answer(*args: Any) -> R:
        try:
            return handler(*args)
        except ShoalError:
            raise
        except Exception as error:
            log.exception("a message could not be answered")
            raise ShoalError(f"{type(error).__name__} at this node (its log says more)") from None

    return answer


app = Session().app()  # of a stock SuperNode
