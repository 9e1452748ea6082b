"""What is sent down: a client always ends up with the server's state and base, bit for bit, in fewer numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from clients.adapters.base_change import Change, Piece, grow, numbers, pack
from clients.adapters.space import Module, Space
from clients.layout import Layout
from fl.downlink import Downlink, Holdings
from fl.messages import MalformedMessage, TrainRequest, payload_bytes
from fl.state import ServerState

SIZES = {"q": (7, 5), "up": (6, 11)}
RANK = 4


def make_space(core: bool = False, ranks: tuple[int, ...] = (), scales: tuple[float, ...] = ()) -> Space:
    names, shapes, groups, modules = [], [], [], []
    for name, (d, k) in SIZES.items():
        c = f"{name}.R" if core else None
        modules.append(Module(name, f"{name}.A", f"{name}.B", 0.7, RANK, c))
        names += [f"{name}.A", *([c] if c else []), f"{name}.B"]
        shapes += [(RANK, k), *([(RANK, RANK)] if core else []), (d, RANK)]
        groups += ["A", *(["R"] if core else []), "B"]
    layout = Layout((*names, "head"), (*shapes, (3, 5)))
    phases = (("R", "head"),) if core else (("B", "head"), ("A", "head"))
    return Space(layout, (*groups, "head"), phases, tuple(modules), ranks, scales)


SPACES = {
    "alike": make_space(),
    "core": make_space(core=True),
    "mixed": make_space(ranks=(4, 2, 3), scales=(0.7, 0.3, 1.1)),
    "mixed core": make_space(core=True, ranks=(1, 4), scales=(0.9, 0.7)),
}


def first(space: Space, seed: int = 0) -> ServerState:
    rng = np.random.default_rng(seed)
    return ServerState(rng.normal(size=space.layout.size).astype(np.float32), space)


def some_increment(rng: np.random.Generator, space: Space) -> dict[str, Piece]:
    """Of some modules, of random ranks or a matrix, in either order of memory, as rules make them."""
    found = {}
    for module in space.modules:
        if rng.random() < 0.4:
            continue
        d, k = space.sizes(module)
        rank = int(rng.choice([-1, 1, 1, 2, 5]))
        if rank < 0:
            found[module.name] = Piece(rng.normal(size=(d, k)).astype(np.float32), None)
        else:
            left = np.asarray(rng.normal(size=(d, rank)).astype(np.float32), order=str(rng.choice(["C", "F"])))
            found[module.name] = Piece(left, rng.normal(size=(k, rank)).astype(np.float32).T)
    return found


def next_state(
    server: ServerState, downlink: Downlink, rng: np.random.Generator, groups: list[str], increment: Change
) -> ServerState:
    """The next version: ``groups`` change and the base grows, as `World.accept` does it."""
    vector = server.vector.copy()
    for group in groups:
        columns = server.space.columns((group,))
        vector[columns] += rng.normal(size=len(columns)).astype(np.float32)
    new = server.replace(vector=vector, version=server.version + 1, increment=increment)
    folded = new.folded()
    downlink.note(server, folded, new.increment)
    return folded


def asked(downlink: Downlink, server: ServerState, client: int, train: tuple[str, ...] | None) -> TrainRequest:
    """The request as the client decodes it."""
    vector, header = downlink.request(server, client, train)
    request = TrainRequest(client, server.round + 1, server.version, vector, server.layout.hash, {"lr": 0.1, **header})
    return TrainRequest.from_record(request.to_record())


def opened(holdings: Holdings, request: TrainRequest, server: ServerState) -> tuple[str, ...]:
    """Open ``request`` and check that it stands for ``server``'s state and base, bit for bit."""
    state, train, base = holdings.open(request.client, request.version, request.state, request.extra)
    expected = server.space.take(server.vector, None, request.client)
    assert state.dtype == np.float32 and np.array_equal(state, expected)
    names = [m.name for m in server.space.modules]
    mine, theirs = pack(base, names), pack(server.base, names)
    assert mine[1] == theirs[1] and np.array_equal(mine[0], theirs[0])
    return train


@dataclass
class Simulation:
    """A server and a node under random luck; every request that is opened is checked."""

    space: Space
    seed: int
    clients: int = 5
    server: ServerState = field(init=False)
    downlink: Downlink = field(init=False)
    holdings: Holdings = field(init=False)
    late: list[tuple[int, int]] = field(default_factory=list)
    opens: int = 0
    numbers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.server = first(self.space, self.seed)
        if self.rng.random() < 0.3:  # an initialisation that takes its start back from the base
            self.server = self.server.replace(base=grow({}, some_increment(self.rng, self.space)))
        self.downlink, self.holdings = Downlink(self.space, True), Holdings(self.space)

    def round(self) -> None:
        rng, server, downlink = self.rng, self.server, self.downlink
        for client, version in self.late:  # of an earlier round
            downlink.heard(client, version)
        self.late = []
        train = self.space.trains(server.version + 1)
        for client in np.flatnonzero(rng.random(self.clients) < 0.6).tolist():
            request = asked(downlink, server, client, train)
            self.numbers.append(len(request.state))
            luck = rng.random()
            if luck < 0.15:
                continue  # lost on the way there
            for _ in range(2 if rng.random() < 0.3 else 1):  # delivered twice
                assert opened(self.holdings, request, server) == train
                self.opens += 1
            if luck < 0.3:
                continue  # the reply is lost
            if luck < 0.45:
                self.late.append((client, server.version))
            else:
                downlink.heard(client, server.version)
        for client in range(self.clients):
            if rng.random() < 0.2:  # an evaluation leaves nothing behind
                held = dict(self.holdings.held)
                assert opened(self.holdings, asked(downlink, server, client, None), server) == ()
                assert self.holdings.held == held
        groups = [g for g in self.space.names if rng.random() < 0.5]
        increment = some_increment(rng, self.space) if rng.random() < 0.6 else {}
        self.server = next_state(server, downlink, rng, groups, increment)

    def restart(self) -> None:
        """Both sides from a checkpoint, through what a file keeps."""
        arrays, meta = self.downlink.parts()
        arrays = {name: a.copy() for name, a in (arrays | self.holdings.parts()).items()}
        assert all(a.dtype in (np.float32, np.int64) for a in arrays.values())
        self.downlink, self.holdings = Downlink(self.space, True), Holdings(self.space)
        self.downlink.restore(arrays, json.loads(json.dumps(meta)))
        self.holdings.restore(arrays)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", SPACES)
def test_whatever_is_lost_late_or_doubled_a_client_has_the_servers_state(name, seed):
    run = Simulation(SPACES[name], seed)
    for _ in range(14):
        run.round()
    assert run.opens > 10 and len(set(run.numbers)) > 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", SPACES)
def test_a_restart_in_the_middle_changes_no_number_that_is_sent(name, seed):
    whole, cut = Simulation(SPACES[name], seed), Simulation(SPACES[name], seed)
    for round in range(12):
        whole.round()
        cut.round()
        if round in (0, 3, 4, 8):
            cut.restart()
    assert whole.numbers == cut.numbers and len(whole.numbers) > 15
    assert whole.downlink.parts()[1] == cut.downlink.parts()[1]
    for mine, theirs in zip((whole.holdings.held, whole.downlink.known), (cut.holdings.held, cut.downlink.known)):
        assert mine == theirs


def test_a_message_that_comes_again_after_a_newer_one_does_no_harm():
    """What it left out can't be known any more: it is refused, and the client keeps the newer state."""
    space, rng = SPACES["alike"], np.random.default_rng(0)
    server, downlink, holdings = first(space), Downlink(space, True), Holdings(space)
    kept: list[TrainRequest] = []
    for groups in (["A", "head"], ["B", "head"], ["A"], ["B"], ["A"]):
        request = asked(downlink, server, 0, space.trains(server.version + 1))
        kept.append(request)
        opened(holdings, request, server)
        downlink.heard(0, server.version)
        for old in kept[:-1]:
            with pytest.raises(MalformedMessage, match=f"holds version {server.version} already"):
                holdings.open(0, old.version, old.state, old.extra)
            opened(holdings, request, server)
        server = next_state(server, downlink, rng, groups, some_increment(rng, space))


def test_a_frozen_group_is_sent_once_and_what_changed_after_that():
    space, rng = SPACES["alike"], np.random.default_rng(0)
    server, downlink, holdings = first(space), Downlink(space, True), Holdings(space)
    sizes = {g: len(space.columns((g,))) for g in space.names}
    sent = ["A", "B", "head"]
    for round, groups in enumerate((["B", "head"], ["B", "head"], ["A", "head"], ["head"], []), 1):
        request = asked(downlink, server, 0, space.trains(round))
        assert request.extra["sent"] == ",".join(sent)
        assert len(request.state) == sum(sizes[g] for g in sent)
        opened(holdings, request, server)
        downlink.heard(0, server.version)
        server, sent = next_state(server, downlink, rng, groups, {}), groups
    request = asked(downlink, server, 0, space.trains(6))
    assert request.extra["sent"] == "" and len(request.state) == 0
    opened(holdings, request, server)


def test_bytes_are_really_fewer():
    """FFA sends B alone, RoLoRA one factor, Fed-SB r^2 numbers a module, each with the head; counted as serialised."""
    for name, trained, columns in (("alike", ("B", "head"), None), ("core", ("R", "head"), 2 * RANK**2 + 15)):
        space, rng = SPACES[name], np.random.default_rng(0)
        server, downlink = first(space), Downlink(space, True)
        size = columns or len(space.columns(trained))
        once = asked(downlink, server, 0, trained)
        full = payload_bytes(once.to_record())
        assert downlink.once(server, 0, trained, once.extra) == 4 * (space.layout.size - size)
        downlink.heard(0, 0)
        server = next_state(server, downlink, rng, list(trained), {})
        again = asked(downlink, server, 0, trained)
        assert len(again.state) == size and downlink.once(server, 0, trained, again.extra) == 0
        saved = full - payload_bytes(again.to_record())
        assert 4 * (space.layout.size - size) <= saved <= 4 * (space.layout.size - size) + 16


def test_a_base_that_the_adapter_began_with_is_a_cost_of_the_first_contact_and_a_later_change_is_not():
    space, rng = SPACES["alike"], np.random.default_rng(0)
    server, downlink = first(space).replace(base=ranked(rng, 1)), Downlink(space, True)
    frozen = 4 * len(space.columns(("A",)))
    request = asked(downlink, server, 0, ("B", "head"))
    assert downlink.once(server, 0, ("B", "head"), request.extra) == frozen + 4 * numbers(server.base)
    downlink.heard(0, 0)
    server = next_state(server, downlink, rng, ["B"], ranked(rng, 1))
    for client, cost in ((0, 0), (1, frozen)):
        request = asked(downlink, server, client, ("B", "head"))
        assert downlink.once(server, client, ("B", "head"), request.extra) == cost


def test_clients_that_keep_nothing_are_sent_everything_and_nothing_is_remembered():
    space, rng = SPACES["alike"], np.random.default_rng(0)
    server, downlink, holdings = first(space), Downlink(space, False), Holdings(space)
    for _ in range(3):
        request = asked(downlink, server, 0, ("A", "B", "head"))
        assert len(request.state) == space.layout.size and "known" not in request.extra
        opened(holdings, request, server)
        downlink.heard(0, server.version)
        server = next_state(server, downlink, rng, ["A"], {})
    assert not holdings.held and not holdings.states and not downlink.known and not downlink.changed


def ranked(rng: np.random.Generator, rank: int) -> dict[str, Piece]:
    return {
        n: Piece(rng.normal(size=(d, rank)).astype(np.float32), rng.normal(size=(rank, k)).astype(np.float32))
        for n, (d, k) in SIZES.items()
    }


def test_increments_or_the_whole_change_whichever_takes_fewer_numbers():
    space, rng = SPACES["alike"], np.random.default_rng(0)
    server, downlink, holdings = first(space), Downlink(space, True), Holdings(space)
    one = numbers(ranked(rng, 1))
    for client in range(4):
        opened(holdings, asked(downlink, server, client, ("B", "head")), server)
        downlink.heard(client, 0)
    seen = []
    for version in range(1, 9):
        server = next_state(server, downlink, rng, [], ranked(rng, 1))
        # Client 0 keeps up; the others come at versions 2, 6 and 8.
        for client in [0, *([{2: 1, 6: 2, 8: 3}[version]] if version in (2, 6, 8) else [])]:
            request = asked(downlink, server, client, ("B", "head"))
            missed = version - (version - 1 if client == 0 else 0)
            described = str(request.extra["base"])
            seen.append((client, described.startswith("=")))
            assert len(request.state) == min(missed * one, numbers(server.base))
            assert described.count("|") == (0 if described.startswith("=") else missed - 1)
            opened(holdings, request, server)
            downlink.heard(client, version)
    assert numbers(server.base) == sum(d * k for d, k in SIZES.values())  # a matrix by now
    assert {(0, False), (0, True), (1, True), (2, True), (3, True)} >= set(seen) and (0, False) in seen


def test_increments_that_everybody_has_are_forgotten():
    space, rng = SPACES["alike"], np.random.default_rng(0)
    server, downlink, holdings = first(space), Downlink(space, True), Holdings(space)
    for version in range(12):
        for client in range(2):
            opened(holdings, asked(downlink, server, client, ("B", "head")), server)
            downlink.heard(client, version)
        server = next_state(server, downlink, rng, ["B"], ranked(rng, 1))
        assert list(downlink.log) == [version + 1]
    assert len(holdings.states) == len(holdings.bases) == 1


def test_requests_of_one_content_share_their_bytes():
    space = SPACES["mixed"]
    server, downlink = first(space), Downlink(space, True)
    vectors = [downlink.request(server, client, ("B", "head"))[0] for client in range(6)]
    assert all(vectors[c] is vectors[c + 3] for c in range(3)) and vectors[0] is not vectors[1]
    downlink.heard(0, 0)
    assert len(downlink.request(server, 0, ("B", "head"))[0]) == 0 < len(downlink.request(server, 3, ("B", "head"))[0])


def test_the_state_of_clients_that_hold_the_same_is_kept_once():
    space, rng = SPACES["mixed"], np.random.default_rng(0)
    server, downlink, holdings = first(space), Downlink(space, True), Holdings(space)
    for client in range(9):
        opened(holdings, asked(downlink, server, client, ("B", "head")), server)
    assert set(holdings.states) == {(0, 0), (0, 1), (0, 2)}
    server = next_state(server, downlink, rng, ["B"], {})
    opened(holdings, asked(downlink, server, 4, ("A", "head")), server)
    assert set(holdings.states) == {(0, 0), (0, 1), (0, 2), (1, 1)}


# What does not fit


@pytest.fixture
def held() -> tuple[Holdings, ServerState, TrainRequest]:
    """A node whose client 0 holds version 0, and a request for version 1 that builds on it."""
    space, rng = SPACES["alike"], np.random.default_rng(0)
    server, downlink, holdings = first(space), Downlink(space, True), Holdings(space)
    opened(holdings, asked(downlink, server, 0, ("B", "head")), server)
    downlink.heard(0, 0)
    server = next_state(server, downlink, rng, ["B"], ranked(rng, 1))
    return holdings, server, asked(downlink, server, 0, ("A", "head"))


WRONG = {
    "builds on what is not held": {"known": 7},
    "builds on text": {"known": "0"},
    "builds on a fraction": {"known": 0.5},
    "unknown group": {"sent": "B,C"},
    "unknown group to train": {"train": "C"},
    "fewer numbers": {"sent": "A,B,head"},
    "numbers left over": {"base": ""},
    "ranks of one module": {"base": "1:1"},
    "no ranks": {"base": "1:"},
    "no version": {"base": "1,1"},
    "ranks that are no numbers": {"base": "1:a,b"},
    "version that is no number": {"base": "x:1,1"},
    "rank below -1": {"base": "1:-2,1"},
    "other ranks": {"base": "1:2,1"},
    "ranks beyond all bounds": {"base": f"1:{10**18},1"},
    "numbers beyond all bounds": {"base": "1:" + "9" * 5000 + ",1"},
    "a number for text": {"base": 5},
    "true for text": {"sent": True},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_header_that_does_not_fit_is_refused_and_changes_nothing(held, name):
    holdings, server, request = held
    before = holdings.parts()
    with pytest.raises(MalformedMessage):
        holdings.open(0, request.version, request.state, {**request.extra, **WRONG[name]})
    after = holdings.parts()
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)
    opened(holdings, request, server)


def test_a_client_that_holds_nothing_has_to_be_sent_everything(held):
    holdings, _, request = held
    with pytest.raises(MalformedMessage, match="client 1 does not hold version 0"):
        holdings.open(1, request.version, request.state, request.extra)
    with pytest.raises(MalformedMessage, match="holds nothing yet"):
        holdings.open(1, request.version, request.state, {**request.extra, "known": -1})


def test_no_header_breaks_a_node(held):
    holdings, _, request = held
    rng = np.random.default_rng(0)
    texts = [
        "",
        ",",
        "|",
        "=",
        ":",
        "A",
        "B",
        "head",
        "-1",
        "0",
        "1",
        "=1,1",
        "1:1,1",
        "1:0,0",
        "=-1,-1",
        "2:",
        "é",
        "\0",
    ]

    def value() -> object:
        kind = rng.integers(6)
        if kind < 3:
            return "".join(rng.choice(texts, size=rng.integers(0, 5)))
        return [int(rng.integers(-3, 4)), float(rng.normal()), bool(rng.random() < 0.5)][kind - 3]

    refused = []
    for _ in range(3000):
        header = dict(request.extra)
        for name in ("sent", "train", "known", "base"):
            if rng.random() < 0.5:
                header[name] = value()
            elif rng.random() < 0.2:
                header.pop(name, None)
        vector = request.state[: rng.integers(0, len(request.state) + 1)] if rng.random() < 0.5 else request.state
        try:
            holdings.open(int(rng.integers(3)), int(rng.integers(-1, 3)), vector, header)
        except MalformedMessage as error:
            refused.append(error.part)
    assert 1000 < len(refused) < 3000 and set(refused) == {"schema", "shape"}
