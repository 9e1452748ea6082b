"""What stays where clients are: their data, their books, and the secret that their noise is keyed with.

At a node `at_node` reads the clients' own files; at the server `at_server` stands in for them. `check_books` is what a
node asks before it spends a client's budget, `Charges` what the server has charged for, on its disk before a request
leaves. `check_hosts` refuses what can't be kept when server and clients are on different hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.adapters.initial.base import DataDriven
from clients.behaviours.none import Honest
from clients.data import at_nodes
from clients.data.at_nodes import AtNodes, AtNodesData, Sizes
from clients.data.federated import FederatedData
from clients.data.sources.files import File
from clients.data.tokens import TokenData
from fl.engine.kept import HomeError, Kept
from fl.errors import ConfigError, ShoalError
from privacy.base import Guard
from privacy.central import Central, amplified
from privacy.dp_zero import DPZero
from privacy.secure_aggregation.settings import SecAggPlus
from privacy.secure_aggregation.shares import SecretShares

if TYPE_CHECKING:
    from fl.experiment import Settings


@dataclass(frozen=True)
class Samples:
    """What the clients of one node have of their own, by client; the settings that it is divided by."""

    own: Mapping[int, TokenData]
    clients: int
    seed: int
    client_test_fraction: float

    def federated(self) -> AtNodesData:
        """The node's data."""
        return at_nodes.node_side(self.own, self.clients, self.seed, self.client_test_fraction)


def localised(resolved: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Any]:
    """The ``resolved`` settings as a node with ``files`` of its own builds them: ``data`` is read from its first file.

    Columns and lengths stay as they are; files and data sets of the server are not looked for. Raises `ConfigError`.
    """
    if not files or not isinstance(resolved.get("data"), Mapping):
        return dict(resolved)
    cls: type[File] = at_nodes.kind_of(files[0])
    own = {"path": str(files[0]), "test_path": None, "group": None}
    names = {f.name for f in fields(cls)} - set(own)
    kept = {name: value for name, value in resolved["data"].items() if name in names}
    return {**resolved, "data": {"_target_": f"{cls.__module__}.{cls.__qualname__}", **kept, **own}}


def check_samples(settings: Settings, clients: Sequence[int], files: Sequence[Path]) -> None:
    """Refuse files of a node's own where the experiment deals data out, none where it does not, and too few.

    Raises `ConfigError`.
    """
    wanted = isinstance(settings.partition, AtNodes)
    if wanted and len(files) != len(clients):
        allowed = f"one file for each of the {len(clients)} clients that this node hosts, with partition=at_nodes"
        raise ConfigError("--data", f"{len(files)} files", allowed, "Start it with `shoal node --data FILE ...`.")
    if files and not wanted:
        allowed = "at_nodes, where nodes have files of their own (--data)"
        way_out = "Run with partition=at_nodes, or start this node without --data."
        raise ConfigError("partition", type(settings.partition).__name__.lower(), allowed, way_out)


def at_node(settings: Settings, clients: Sequence[int], files: Sequence[Path], labels: Sequence[str]) -> Samples | None:
    """The samples of a node's ``clients``, each of its own file; None where the experiment deals data out.

    ``labels`` are the names of the experiment's labels. Raises `ConfigError` for settings, `HomeError` for a file: its
    text, which goes to the server, tells nothing that is in the file.
    """
    check_samples(settings, clients, files)
    if not files:
        return None
    if settings.clients.number is None:
        raise ConfigError("clients.number", None, "a number with partition=at_nodes", "Give clients.number=4.")
    own, least = {}, settings.partition.min_size
    for client, path in zip(clients, files, strict=True):
        try:
            source = at_nodes.source_of(settings.data, path)
            own[client] = at_nodes.samples(source, settings.model, labels)
            if len(own[client]) < least:
                raise ConfigError("partition.min_size", least, f"at most the {len(own[client])} samples of this file")
        except Exception as error:  # any text may have a row of the file in it
            text = f"client {client}: its file can't be read as samples of this experiment ({type(error).__name__})"
            raise HomeError(text, f"{path}: {error}") from None
    return Samples(own, settings.clients.number, settings.seed, settings.data.client_test_fraction)


def sizes_hidden(settings: Settings) -> bool:
    """Whether how many samples a client has is not the server's to know: it is a secret of the claim, or of the sum.

    A claim about examples takes it as public.
    """
    unit = settings.privacy.unit
    return unit == "client" or (unit is None and settings.secure_aggregation.active)


def told(settings: Settings, data: FederatedData, clients: Sequence[int]) -> tuple[list[int], list[int]]:
    """How many samples a node tells that its ``clients`` train on and are tested on; ones where that is hidden."""
    if sizes_hidden(settings):
        return [1] * len(clients), [1] * len(clients)
    return [len(data.parts[c]) for c in clients], [len(data.client_tests[c]) for c in clients]


def at_server(settings: Settings, train: TokenData, test: TokenData, sizes: Sizes) -> AtNodesData:
    """The server's data under partition=at_nodes: its own samples, and the ``sizes`` that nodes told.

    Raises `ConfigError` where none were, since all clients are in this process.
    """
    number = settings.clients.number
    if not sizes:
        settings.partition.split(None, None, 0, number, None)  # type: ignore[arg-type]  # refuses
    if number != len(sizes):
        raise ShoalError(f"nodes told the sizes of {len(sizes)} clients; clients.number={number}")
    return at_nodes.server_side(train, test, sizes, settings.seed, settings.data.public)


def check_apart(settings: Settings, resident: bool) -> None:
    """Refuse what is lost or not counted where clients train in other processes than the server's.

    ``resident``: a client's process stays alive between its messages. Raises `ConfigError`.
    """
    privacy, secure = settings.privacy, settings.secure_aggregation
    if isinstance(secure, SecAggPlus) and not resident:
        allowed = "none where a process ends with each message (a stock SuperNode), or is another each time (Ray)"
        raise ConfigError("secure_aggregation", "secagg", allowed, "Start the nodes with `shoal node`.")
    if getattr(privacy, "audit", False) and privacy.unit == "example":
        allowed = "false where clients train in other processes: what the canaries see stays there"
        raise ConfigError("privacy.audit", True, allowed, "Audit the same settings with engine=in_process.")
    if isinstance(privacy, DPZero):
        allowed = "another where peers train in other processes: what their scalars cost is counted by them alone"
        raise ConfigError("privacy", "dp_zero", allowed)


def check_hosts(settings: Settings, resident: bool = True) -> None:
    """Refuse what can't be kept where clients and server are on different hosts, and each has secrets of its own.

    Everybody there knows the settings and the seed, so no claim may count on a draw from the seed. Raises
    `ConfigError`.
    """
    check_apart(settings, resident)
    if isinstance(settings.secure_aggregation, SecretShares):
        allowed = "none or secagg on hosts: the servers that hold shares are simulated, all in one process"
        raise ConfigError("secure_aggregation", "shares", allowed)
    if isinstance(settings.privacy, Central) and amplified(settings):
        allowed = (
            "available on hosts: the claim counts on a secret draw of clients, and nodes know the seed of this one"
        )
        raise ConfigError("sampling", type(settings.sampling).__name__.lower(), allowed, "Or use privacy=dp_ftrl.")
    start = settings.adapter.initialisation
    if isinstance(start, DataDriven) and start.source == "private":
        allowed = "public on hosts: the noise of a private start is keyed by the seed, which the server knows"
        raise ConfigError("adapter.init.source", "private", allowed)
    if isinstance(settings.partition, AtNodes):
        if not isinstance(settings.attack, Honest):
            allowed = "none with partition=at_nodes: attackers are simulated, and these data are not"
            raise ConfigError("attack", type(settings.attack).__name__, allowed)
        if isinstance(settings.secure_aggregation, SecAggPlus) and settings.aggregator.weights == "examples":
            allowed = "uniform with partition=at_nodes and secure aggregation, whose range is planned by all samples"
            raise ConfigError("aggregator.weights", "examples", allowed)


def check_kind(guard: Guard, client: int, book: Mapping[str, Any]) -> None:
    """Refuse to go on from what ``client`` kept where it has a ``book`` and this run none, or the other way round.

    A run's name is the server's choice: what is spent under a name must not be forgotten by another run that is called
    the same. Raises `ShoalError`.
    """
    if bool(book) != bool(guard.client_state(client)):
        there, here = ("a", "has none") if book else ("no", "has one")
        raise ShoalError(
            f"client {client} has taken part in a run of this name with {there} privacy book, and this run {here}: "
            "they are not the same run. Start this one anew."
        )


def check_books(guard: Guard, client: int, answered: int) -> None:
    """Refuse to spend more of ``client``'s budget where its book can't be whole.

    ``answered`` is the newest of the client's jobs (their ``round``) of which the server has heard a training reply; 0:
    none. It was in the book, and the book on the disk, before the reply left; one that ends before it is lost, or an
    old copy. Raises `ShoalError`.
    """
    book = guard.client_state(client)
    newest = int(book.get("newest", {}).get("round", 0))
    if book and newest < answered:
        raise ShoalError(
            f"client {client}'s privacy book ends with job {newest}, and the server has heard an answer to job "
            f"{answered}: it was lost, so what was spent can't be accounted for. Put the node's folder back, or start "
            "the run anew."
        )


class Charges:
    """What the server has charged clients for (`Guard.mirror`), kept by ``kept`` so that a crash forgets nothing.

    A checkpoint is older than the last requests, which nodes may have spent on; so the books are written by themselves,
    before requests leave. ``answered`` is what `check_books` is told of each client.
    """

    def __init__(self, guard: Guard, kept: Kept, clients: int):
        self.guard, self.kept, self.clients = guard, kept, clients
        self.answered = dict.fromkeys(range(clients), 0)

    def restore(self) -> None:
        """Take up what is on the disk: after the checkpoint, whose books are older."""
        found = self.kept.load(0)
        if found is not None:
            for client, (book, answered) in enumerate(found[1]["clients"]):
                self.guard.restore_client(client, book)
                self.answered[client] = answered

    def heard(self, client: int, job: int) -> None:
        """Note that a training reply to a ``job`` of ``client`` has come; the same one may come again."""
        self.answered[client] = max(self.answered[client], job)

    def save(self) -> None:
        """Write all books: after requests were charged and before they leave. Raises `ShoalError`."""
        rows = [[self.guard.client_state(c), self.answered[c]] for c in range(self.clients)]
        if any(book for book, _ in rows):
            self.kept.save(0, {}, {"clients": rows})
