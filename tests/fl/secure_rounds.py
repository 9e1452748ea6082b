"""Rounds of secure aggregation over a node whose training is made up, and all that their server gets and holds."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Error, Message

from aggregators.fedavg import FedAvg
from aggregators.server_optimizers import SGD
from clients.adapters.space import Space
from clients.behaviours.none import Honest
from clients.layout import Layout
from clients.local.training import Fit, LocalTraining, Work
from fl.downlink import Downlink
from fl.engine.in_process import FIRST_NODE, InProcessGrid
from fl.keys import generator
from fl.network import Instant
from fl.node import Node
from fl.sampling import Fixed
from fl.schedules.base import World
from fl.schedules.synchronous import Synchronous
from fl.secure import MASKED, SecureClients, make_codecs
from fl.state import ServerState
from fl.validation import Validator
from privacy.base import Guard
from privacy.secure_aggregation.protocol import Participant
from privacy.secure_aggregation.settings import SecAggPlus

SPACE = Space(Layout(("A", "B"), ((40, 20), (20, 10))))
SIZE = SPACE.layout.size  # 1,000
EXAMPLES = (1009, 1301, 1601, 1901, 2203, 2503, 2801, 3109)  # of client 0, 1, ...; numbers that nothing else has
FEW = SecAggPlus(colluding=0.1, dropout=0.3)


def update_of(client: int, round: int) -> np.ndarray:
    return generator(8, "made-up update", client, round).normal(0, 0.1, SIZE).astype(np.float32)


def loss_of(client: int, round: int) -> float:
    return float(generator(8, "made-up loss", client, round).random())


def mean_of(clients, round: int, weighted: bool = False) -> np.ndarray:
    weights = [EXAMPLES[c] if weighted else 1 for c in clients]
    return np.average([update_of(c, round).astype(np.float64) for c in clients], axis=0, weights=weights)


@dataclass
class Trainer:
    """Gives each client its made-up update and loss; ``instead`` replaces updates, ``steps`` how long they took."""

    instead: dict[int, np.ndarray] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)

    def train(self, works: list[Work]) -> list[Fit]:
        fits = []
        for w in works:
            moved = self.instead.get(w.client, update_of(w.client, w.round))
            fits.append(Fit(w.client, w.start + moved, loss_of(w.client, w.round), self.steps.get(w.client, 1), 997))
        return fits


class Data:
    poison = None

    def __init__(self, number: int):
        ends = np.cumsum((0, *EXAMPLES[:number]))
        self.parts = [np.arange(a, b) for a, b in itertools.pairwise(ends)]

    def __len__(self) -> int:
        return len(self.parts)


class Wire(InProcessGrid):
    """A grid of one client a node. ``lost`` are (stage, client) that never answer; ``pulled`` is all that came back."""

    def __init__(self, node: Node, number: int, lost=()):
        super().__init__(self._answered_by(node), number)
        self.lost, self.pulled, self.sent = set(lost), [], []

    def _answered_by(self, node: Node):
        def app(message: Message, context: Any) -> Message:
            header = message.content["header"]
            stage = header.get("extra.stage", "train")
            if (stage, header["client"]) in self.lost:
                return Message(Error(0, "gone"), reply_to=message)
            (reply,) = node.query([message]) if stage != "train" else node.train([message])
            return reply

        return app

    def push_messages(self, messages):
        messages = list(messages)
        self.sent += messages
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        got = super().pull_messages(message_ids)
        self.pulled += got
        return got


def make(
    number: int = 6,
    secure: SecAggPlus | None = FEW,
    weights: str = "uniform",
    guard: Guard | None = None,
    trainer: Trainer | None = None,
    behaviour: Any = None,
    lost=(),
    network: Any = None,
    seed: int = 3,
    per_round: int | None = None,
    sampling: Any = None,
) -> World:
    """A world of ``number`` clients of a made-up node, put together as `fl.server_app` and `fl.experiment` do it."""
    guard, sampling, per_round = guard or Guard(), sampling or Fixed(), per_round or number
    most = sum(EXAMPLES[:number]) if weights == "examples" else 1
    asked = min(number, sampling.asked(per_round))
    codecs = None if secure is None else make_codecs(secure, guard, SPACE, asked, most)
    half = None if secure is None else SecureClients(secure, seed, codecs, weights == "examples")
    local = LocalTraining(steps=1, batch_size=1)
    node = Node(trainer or Trainer(), Data(number), local, behaviour or Honest(), seed, SPACE, guard, secure=half)
    grid = Wire(node, number, lost)

    def arrays(request):
        codec = None if codecs is None else codecs(request.round)
        return {} if codec is None else {MASKED: (codec.dtype.name, codec.length)}

    validator = Validator(
        SPACE.layout.hash, 0 if secure else SIZE, 1e4, max_weight=sum(EXAMPLES[:number]), arrays=arrays
    )
    return World(
        grid, [FIRST_NODE + c for c in range(number)], seed, per_round, ServerState(np.zeros(SIZE, np.float32), SPACE),
        FedAvg(weights), SGD(), sampling, network or Instant(), local, validator, Downlink(SPACE, False), guard,
        secure, codecs,
    )  # fmt: skip


def play(world: World, rounds: int = 1, **schedule) -> list[dict[str, Any]]:
    return list(Synchronous(rounds, **schedule).run(world))


# All that a server gets and holds


@dataclass
class Seen:
    """Arrays (as whole numbers or floats), byte strings and numbers, with where each of them was."""

    arrays: list[tuple[str, np.ndarray]] = field(default_factory=list)
    texts: list[tuple[str, bytes]] = field(default_factory=list)
    numbers: list[tuple[str, float]] = field(default_factory=list)
    _ids: set[int] = field(default_factory=set)
    _alive: list[Any] = field(default_factory=list)  # so that no id is used twice

    def look(self, thing: Any, where: str, skip: tuple[int, ...] = ()) -> None:
        """Take in ``thing`` and all that hangs on it, but for the objects whose ids are in ``skip``."""
        if isinstance(thing, bool) or thing is None or id(thing) in skip:
            return
        if isinstance(thing, int | float | np.number):
            self.numbers.append((where, float(thing)))
            return
        if isinstance(thing, type | types.ModuleType) or id(thing) in self._ids:
            return
        self._ids.add(id(thing))
        self._alive.append(thing)
        if isinstance(thing, np.ndarray):
            self.arrays.append((where, thing))
            self.texts.append((where, thing.tobytes()))
        elif isinstance(thing, bytes | bytearray | str):
            data = thing.encode() if isinstance(thing, str) else bytes(thing)
            self.texts.append((where, data))
            self.arrays += [(where, np.frombuffer(data[: len(data) // n * n], f"<u{n}")) for n in (4, 8)]
            self.arrays += [(where, np.frombuffer(data[: len(data) // n * n], f"<f{n}")) for n in (4, 8)]
        elif isinstance(thing, types.FunctionType):
            for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or ()):
                self.look(cell.cell_contents, f"{where}.{name}", skip)
        elif isinstance(thing, dict):
            for key, value in list(thing.items()):
                self.look(key, where, skip)
                self.look(value, f"{where}[{key!r:.20}]", skip)
        elif isinstance(thing, list | tuple | set | frozenset) or type(thing).__name__ == "deque":
            for value in list(thing):
                self.look(value, f"{where}[]", skip)
        else:
            for name in {*getattr(thing, "__dict__", {}), *getattr(type(thing), "__slots__", ())}:
                self.look(getattr(thing, name, None), f"{where}.{name}", skip)

    def frames(self, running: Iterator, skip: tuple[int, ...]) -> None:
        """The local variables of a generator and of those that it waits for."""
        while running is not None:
            self.look(dict(running.gi_frame.f_locals), running.__name__, skip)
            running = getattr(running, "gi_yieldfrom", None)


def watch(world: World, rounds: int = 1, **schedule) -> tuple[Seen, Seen, list[dict[str, Any]]]:
    """Play; what was pulled, what the server's objects held at any event, and the events."""
    pulled, held, events = Seen(), Seen(), []
    running = Synchronous(rounds, **schedule).run(world)
    grid, skip = world.grid, (id(world.grid),)
    for event in running:
        events.append(event)
        held.frames(running, skip)
        held.look(world, "world", skip)
        held.look(event, "event")
    for message in grid.pulled:
        pulled.look(message.error.reason if message.has_error() else dict(message.content), "pulled")
    return pulled, held, events


def leaks(seen: Seen, clients, round: int, limit: float) -> list[str]:
    """Where ``seen`` shows an update, number of examples or loss of one of ``clients`` in ``round``.

    An array shows an update if they correlate above ``limit``, or if its low bytes are those that the client encoded
    (see `remember`).
    """
    found = []
    for client in clients:
        plain = update_of(client, round)
        forms = {"float32": plain.tobytes(), "float64": plain.astype(np.float64).tobytes()}
        low = None
        if (client, round) in ENCODED:
            encoded = ENCODED[client, round]
            forms["encoded"], low = encoded.tobytes(), encoded.view(np.uint8)[:: encoded.itemsize]
        for name, data in forms.items():
            needles = [data[at : at + 16] for at in range(0, len(data) - 16, len(data) // 8 // 8 * 8)]
            found += [f"{w}: {name} update of {client}" for w, t in seen.texts if any(n in t for n in needles)]
        centred = plain - plain.mean()
        for where, array in seen.arrays:
            if len(array) < SIZE or array.ndim != 1:
                continue
            signed = array.view(array.dtype.str.replace("u", "i")) if array.dtype.kind == "u" else array
            with np.errstate(all="ignore"):
                part = signed[:SIZE].astype(np.float64)
                part = part - part.mean()
                corr = abs(float(part @ centred)) / (np.linalg.norm(part) * np.linalg.norm(centred))
            if corr > limit:
                found.append(f"{where}: correlates {corr:.2f} with the update of {client}")
            if low is not None and array.dtype.kind == "u":
                same = int((array.view(np.uint8)[:: array.itemsize][:SIZE] == low[:SIZE]).sum())
                if same > 40:  # 4 by chance; more than 40 of 1,000 with probability below 1e-25
                    found.append(f"{where}: {same} low bytes of the encoded update of {client}")
        for secret in (EXAMPLES[client], loss_of(client, round)):
            found += [f"{w}: {secret} of {client}" for w, n in seen.numbers if n == secret]
            digits = f"{secret:g}".encode()
            digits = f"{secret:g}".encode()
            found += [f"{w}: {secret} of {client}" for w, t in seen.texts if len(t) < 300 and digits in t]
    return found


ENCODED: dict[tuple[int, int], np.ndarray] = {}  # what `remember` saw the clients encode: (client, round)


def remember(monkeypatch) -> None:
    """Note what each client hands to be masked."""
    ENCODED.clear()
    mask = Participant.mask

    def noting(self, vector, inbox):
        ENCODED[self.client, int(self.context.split()[1])] = vector.copy()
        return mask(self, vector, inbox)

    monkeypatch.setattr(Participant, "mask", noting)
