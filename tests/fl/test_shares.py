"""Secret-shared sums in rounds: what each server gets, that sums are right, and what hostile clients can't do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2

from clients.behaviours.faulty import Faulty
from clients.behaviours.none import Honest
from fl.errors import RunStopped
from fl.keys import generator, key_bytes
from fl.messages import TrainRequest
from fl.node import Node
from fl.schedules.base import World
from fl.secure import context, make_codecs
from fl.shares import SharedClients, SharedRound, names, server_secret
from fl.validation import Validator
from privacy.base import Guard
from privacy.secure_aggregation import field
from privacy.secure_aggregation.norm_check import ROWS, NormCheck
from privacy.secure_aggregation.primitives import public_key
from privacy.secure_aggregation.shares import Aggregator, ProofCodec, SecretShares, messages
from tests.fl import secure_rounds
from tests.fl.secure_rounds import SIZE, SPACE, Data, Seen, Trainer, Wire, leaks, make, mean_of, play, update_of

CHANCE = 7 / SIZE**0.5  # a correlation above this of a uniform vector: probability 3e-12
ONE_OF_MANY = 0.8  # the mean of k updates correlates with each of them, by about k^-0.5
STEP = 1.01 / ProofCodec(SIZE, 10.0, 5).scale  # rounding in two rounds, and float32
SHARES = SecretShares(clip=10.0)  # longer than any of the made-up updates, whose norms are about 3


class Hostile(SharedClients):
    """``instead`` gives what some clients send in place of their own honest ``arrays``."""

    def __init__(self, *parts, instead):
        super().__init__(*parts)
        self.instead = instead

    def mask(self, request, update, examples):
        arrays = super().mask(request, update, examples)
        change = self.instead.get(request.client)
        return arrays if change is None else change(arrays, request)


class Noisy(Guard):
    """Nothing but a codec: the noise that each server adds."""

    def __init__(self, noise: float):
        super().__init__()
        self.noise = noise

    def codec(self, size, round):
        return ProofCodec(size, 10.0, 6, self.noise)


def shared(number=5, secure=SHARES, guard=None, trainer=None, behaviour=None, instead=None, lost=(), **more) -> World:
    """The world of `make`, under secret shares."""
    world = make(number, None, guard=guard, trainer=trainer, lost=lost, **more)
    codecs = make_codecs(secure, world.guard, SPACE, number, 1)
    half = Hostile(secure, world.seed, codecs, instead=instead or {})
    trainer, behaviour = trainer or Trainer(), behaviour or Honest()
    node = Node(trainer, Data(number), world.local, behaviour, world.seed, SPACE, world.guard, secure=half)
    world.grid = Wire(node, number, lost)
    arrays = dict.fromkeys(names(secure.servers), ("uint8", -1))
    world.validator = Validator(SPACE.layout.hash, 0, 1e4, arrays=lambda request: arrays)
    world.secure, world.codecs = secure, codecs
    return world


def watched(world: World, monkeypatch) -> tuple[Seen, list[Seen]]:
    """Play a round: what the Flower server pulled and held, and what each of the servers held of its own."""
    secure_rounds.ENCODED.clear()
    encode, opened, made = ProofCodec.encode, Aggregator.open, []

    def encoding(self, update, weight, rng, arrays):
        integers = encode(self, update, weight, rng, arrays)
        client = next(c for c in range(8) if np.array_equal(update, update_of(c, 1)))
        secure_rounds.ENCODED[client, 1] = integers.copy()
        return integers

    def opening(self, *parts):
        out = opened(self, *parts)
        made.extend(Seen() for _ in range(world.secure.servers - len(made)))
        for client, share in self._pending.items():
            made[self.index].look([client, share.copy(), field.decode(share)], "pending")
        made[self.index].look(out, "opening")
        return out

    monkeypatch.setattr(ProofCodec, "encode", encoding)
    monkeypatch.setattr(Aggregator, "open", opening)
    flower, events = Seen(), play(world)
    for message in world.grid.pulled:
        flower.look(dict(message.content), "pulled")
    flower.look(events, "events")
    flower.look(world, "world", (id(world.grid),))
    return flower, made


def test_the_sum_is_that_of_the_clipped_updates():
    world = shared()
    events = play(world, 2)
    mean = mean_of(range(5), 1) + mean_of(range(5), 2)
    np.testing.assert_allclose(world.server.vector, mean, atol=STEP)
    assert [e["accepted"] for e in events if e["event"] == "round"] == [5, 5]
    short = shared(secure=SecretShares(clip=0.5))
    play(short)
    clipped = np.mean([u * 0.5 / np.linalg.norm(u) for u in (update_of(c, 1) for c in range(5))], axis=0)
    np.testing.assert_allclose(short.server.vector, clipped, atol=STEP)


@pytest.mark.parametrize("servers", [2, 3])
def test_no_server_sees_a_single_update(servers, monkeypatch):
    world = shared(secure=replace(SHARES, servers=servers))
    flower, each = watched(world, monkeypatch)
    assert len(flower.arrays) > 20 and len(each) == servers and all(len(seen.arrays) > 10 for seen in each)
    assert leaks(flower, range(5), 1, ONE_OF_MANY) == []
    for seen in each:
        assert leaks(seen, range(5), 1, CHANCE) == []


def test_the_inspection_finds_shares_without_masks(monkeypatch):
    """Else the test above would show nothing."""
    monkeypatch.setattr(field, "draw", lambda seed, count: np.zeros(count, np.uint64))
    _, each = watched(shared(), monkeypatch)
    for client in range(5):
        assert "correlates 1.00" in " ".join(leaks(each[-1], [client], 1, CHANCE))


def test_the_opened_sum_has_the_noise_of_every_server_and_the_same_again():
    sigma = 1e6

    def opened(**more) -> np.ndarray:
        world = shared(guard=Noisy(sigma), **more)
        play(world)
        return world.server.vector.astype(np.float64)

    first, scale = opened(), ProofCodec(SIZE, 10.0, 6).scale
    noise = (first - mean_of(range(5), 1)) * 5 * scale
    # chi-square with 1,000 degrees of freedom; fails for one seed in ten million
    low, high = chi2.ppf([5e-8, 1 - 5e-8], SIZE) * 2 * sigma**2
    assert low < (noise**2).sum() < high
    np.testing.assert_array_equal(first, opened())
    other = opened(lost={("train", 4)}) * 4 - mean_of(range(4), 1) * 4
    assert abs(np.corrcoef(noise, other)[0, 1]) < 7 / SIZE**0.5


# Clients that do not keep to the protocol


class Liar(NormCheck):
    """The best proof for a vector that is too long: all is true but the slack, which is said to be 0."""

    def prove(self, integers, secret, context, client):
        commitment = self._commit(field.encode(integers), secret, context, client)
        numbers = [int(y) + 2 ** (self.width - 1) for y in field.decode(commitment[-1])] + [0] * (self.groups - ROWS)
        steps = np.arange(self.width, dtype=np.uint64)
        bits = (np.array(numbers, np.uint64)[None, :] >> steps[:, None]) & np.uint64(1)
        return self._prove(commitment, bits, secret, context, client)


def long_vector(excess: float, seed: int = 3):
    """A client that sends an integer vector of ``excess`` times the bound, with the best proof there is."""

    def change(arrays, request):
        codec = ProofCodec(SIZE, SHARES.clip, 5)
        x = generator("long").normal(size=SIZE)
        integers = np.trunc(x / np.linalg.norm(x) * excess * codec.bound).astype(np.int64)
        if excess == 1.0:  # what is missing to the bound is said truly by nobody but an honest prover
            check = NormCheck(SIZE, codec.bound)
        else:
            check = Liar(SIZE, codec.bound)
        publics = [public_key(server_secret(seed, s)) for s in range(2)]
        texts = messages(check, integers, key_bytes("liar"), publics, context(seed, request.round), request.client)
        return {n: np.frombuffer(m, np.uint8) for n, m in zip(names(2), texts, strict=True)}

    return change


@pytest.mark.parametrize("excess", [1.01, 3.0])
def test_a_norm_above_the_clip_is_found_out_and_the_others_are_summed(excess):
    world = shared(instead={2: long_vector(excess)})
    events = play(world)
    assert events[-1]["rejected"] == {"proof": 1} and events[-1]["accepted"] == 4
    assert [e["reason"] for e in events if e["event"] == "client" and e["client"] == 2] == ["proof"]
    np.testing.assert_allclose(world.server.vector, mean_of([0, 1, 3, 4], 1), atol=STEP)


def test_hostile_clients_within_the_norm_move_the_mean_by_their_share_of_the_clip():
    world = shared(instead={2: long_vector(1.0), 3: long_vector(1.0)})
    events = play(world)
    assert events[-1]["accepted"] == 5
    moved = np.linalg.norm(world.server.vector - mean_of([0, 1, 4], 1) * 3 / 5)
    codec = ProofCodec(SIZE, SHARES.clip, 5)
    assert 0.999 * 2 / 5 * 10 < moved <= 2 / 5 * codec.bound / codec.scale * (1 + 1e-6)


def flipped(arrays, request):
    bad = arrays["share1"].copy()
    bad[len(bad) // 2] ^= 1
    return arrays | {"share1": bad}


def fuzzed(k):
    def change(arrays, request):
        rng = generator("fuzz", k)
        return {n: np.frombuffer(rng.bytes(int(rng.integers(1, 2 * len(a)))), np.uint8) for n, a in arrays.items()}

    return change


BAD = {
    "one bit": (flipped, "proof"),
    "swapped": (lambda a, r: {"share0": a["share1"], "share1": a["share0"]}, "proof"),
    "empty": (lambda a, r: {n: np.zeros(0, np.uint8) for n in a}, "proof"),
    "cut": (lambda a, r: a | {"share1": a["share1"][:-8]}, "proof"),
    "one missing": (lambda a, r: {"share0": a["share0"]}, "schema"),
    "one too many": (lambda a, r: a | {"share2": a["share0"]}, "schema"),
    "another type": (lambda a, r: a | {"share0": np.zeros(188, np.float32)}, "shape"),
    **{f"noise {k}": (fuzzed(k), "proof") for k in range(6)},
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_share_is_rejected_and_the_others_are_summed(case):
    change, reason = BAD[case]
    world = shared(3, instead={1: change})
    assert play(world)[-1]["rejected"] == {reason: 1}
    np.testing.assert_allclose(world.server.vector, mean_of([0, 2], 1), atol=STEP)


def test_another_client_s_or_round_s_shares_are_rejected():
    seen = {}

    def copied(arrays, request):
        return seen["other"]

    def first(arrays, request):
        seen.setdefault("other", arrays)
        return seen["other"] if request.round == 2 else arrays

    world = shared(3, instead={0: first, 1: copied})
    events = [e for e in play(world, 2) if e["event"] == "round"]
    assert [e["rejected"] for e in events] == [{"proof": 1}, {"proof": 2}]
    np.testing.assert_allclose(world.server.vector, mean_of([0, 2], 1) + update_of(2, 2), atol=STEP)


def test_a_client_is_in_a_sum_once(monkeypatch):
    add = SharedRound.add

    def twice(self, client, reply):
        add(self, client, reply)
        with pytest.raises(Exception, match="already"):
            add(self, client, reply)

    monkeypatch.setattr(SharedRound, "add", twice)
    world = shared(3)
    play(world)
    np.testing.assert_allclose(world.server.vector, mean_of(range(3), 1), atol=STEP)


@pytest.mark.parametrize("kind", ["nan", "inf", "wrong_shape"])
def test_an_update_that_can_not_be_encoded_drops_out_and_says_no_number(kind):
    world = shared(4, behaviour=Faulty(clients=[1], kind=kind))
    events = play(world)
    assert events[-1]["rejected"] == {"error": 1} and events[-1]["accepted"] == 3
    (text,) = [m.error.reason for m in world.grid.pulled if m.has_error()]
    assert text == "client 1 takes no part in round 1: its update can't be encoded"
    np.testing.assert_allclose(world.server.vector, mean_of([0, 2, 3], 1), atol=STEP)


def test_absurd_numbers_are_clipped_by_an_honest_program():
    world = shared(4, behaviour=Faulty(clients=[1], kind="huge_norm"))
    assert play(world)[-1]["accepted"] == 4
    assert np.linalg.norm(world.server.vector - mean_of([0, 2, 3], 1) * 3 / 4) <= 10 / 4 * (1 + 1e-5)


def test_clients_that_are_lost_are_not_missed_and_none_left_stops_the_run():
    world = shared(4, lost={("train", 2)})
    play(world)
    np.testing.assert_allclose(world.server.vector, mean_of([0, 1, 3], 1), atol=STEP)
    with pytest.raises(RunStopped, match="proof"):
        play(shared(2, instead={0: flipped, 1: flipped}))


# What is drawn for what


def answer(update: np.ndarray, round: int = 1, client: int = 0, centre: np.ndarray | None = None) -> np.ndarray:
    """The last server's share of a client's vector."""

    class Centred(ProofCodec):
        def inside(self, update, arrays):
            return super().inside(update - arrays.get("centre", 0), arrays)

    codec = Centred(SIZE, 10.0, 5)
    half = SharedClients(SHARES, 3, lambda round: codec)
    arrays = {} if centre is None else {"centre": centre}
    request = TrainRequest(client, round, 0, np.zeros(0, np.float32), "layout", {}, arrays)
    check = NormCheck(SIZE, codec.bound)
    server = Aggregator(1, check, server_secret(3, 1), context(3, round))
    server.open(client, half.mask(request, update, 1)["share1"].tobytes(), key_bytes("query"))
    return server._pending[client]


def test_another_vector_gets_other_shares_and_the_same_one_the_same():
    """Two vectors under one mask show their difference, also if only the centre that they are taken from is another."""
    update, centre = update_of(0, 1), np.full(SIZE, 1e-3)
    first = answer(update)
    np.testing.assert_array_equal(first, answer(update))
    tiny = update.copy()
    tiny[0] += 1e-3
    for other in (answer(tiny), answer(update, centre=centre), answer(update, 2), answer(update, client=1)):
        apart = np.abs(field.decode(field.subtract(first, other)))
        # of independent shares: uniform below 2^60, so one below 2^30 has probability 1e-9, and 1,000 of them 1e-6
        assert apart.min() > 2**20  # one below: probability 1e-9
