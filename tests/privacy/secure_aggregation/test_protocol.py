import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fl.errors import ShoalError
from fl.keys import generator
from privacy.secure_aggregation import shamir
from privacy.secure_aggregation.graph import Topology
from privacy.secure_aggregation.primitives import add_mask, agree, pack, unpack
from privacy.secure_aggregation.protocol import DROPPED, IN_SUM, TooFewClients
from privacy.secure_aggregation.quantise import Quantiser, finest_scale
from tests.privacy.secure_aggregation.rounds import STAGES, Round

SPARSE = Topology(0.1, 0.1, security_bits=10, correctness_bits=5, complete_up_to=0)


def chi_square(values: np.ndarray) -> float:
    """Of the highest 4 bits of ``values``, against the uniform law: 15 degrees of freedom."""
    high = values >> values.dtype.type(8 * values.itemsize - 4)
    counts = np.bincount(high.astype(np.int64), minlength=16)
    return float(((counts - len(values) / 16) ** 2 / (len(values) / 16)).sum())


UNIFORM = 80.0  # chi-square with 15 degrees of freedom is above this with probability 7e-11; about 100 are looked at


@settings(max_examples=30, deadline=None)
@given(
    clients=st.integers(4, 40),
    sparse=st.booleans(),
    wide=st.booleans(),
    length=st.integers(0, 50),
    seed=st.integers(0, 2**32),
    fractions=st.tuples(*[st.floats(0, 0.3)] * 4),
)
def test_the_sum_is_that_of_the_survivors_or_there_is_none(clients, sparse, wide, length, seed, fractions):
    """With dropouts at all stages: exactly the plain sum, or an error where a neighbourhood is below its threshold."""
    topology = SPARSE if sparse and clients > 12 else Topology()
    draws = generator(seed)
    ids = [int(i) for i in draws.choice(10_000, clients, replace=False)]
    left, lost = list(ids), {}
    for stage, fraction in zip(STAGES, fractions, strict=True):
        lost[stage] = {int(i) for i in draws.choice(left, int(fraction * clients / 2), replace=False)}
        left = [i for i in left if i not in lost[stage]]
    played = Round(topology, ids, length, np.uint64 if wide else np.uint32, seed, lost=lost)
    try:
        got = played.run()
    except TooFewClients:
        assert any(lost.values())
        return
    expected = [i for i in ids if not any(i in lost[s] for s in STAGES[:3])]
    assert played.coordinator.survivors == tuple(sorted(expected))
    assert got.tobytes() == played.plain_sum(expected).tobytes()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("topology", [Topology(), Topology(0.05, 0.15, complete_up_to=0)])
def test_dropouts_within_the_plan_are_withstood_at_each_stage(stage, topology):
    ids = list(range(40))
    lost = {3, 17, 21}
    played = Round(topology, ids, 100, lost={stage: lost})
    got = played.run()
    in_sum = ids if stage == "unmask" else [i for i in ids if i not in lost]
    assert got.tobytes() == played.plain_sum(in_sum).tobytes()


def test_weighted_means_of_real_vectors():
    clients, clip, max_weight = 12, 2.0, 300
    quantiser = Quantiser(clip, clients, finest_scale(clip, clients, max_weight), max_weight)
    played = Round(Topology(), list(range(clients)), 51, lost={"mask": {2, 5}})
    draws = generator("weighted")
    x = draws.uniform(-clip, clip, (clients, 50))
    weights = draws.integers(1, max_weight, clients, endpoint=True)
    played.vectors = {i: quantiser.encode(x[i], int(weights[i]), draws) for i in played.ids}
    got, weight = quantiser.decode(played.run())
    heard = list(played.coordinator.survivors)
    assert weight == weights[heard].sum()
    assert np.abs(got - weights[heard] @ x[heard]).max() <= quantiser.error_bound(len(heard)) + 1e-9


def test_a_round_replays_and_another_seed_or_round_shares_nothing():
    def everything(**other):
        played = Round(SPARSE, list(range(20)), 30, **other)
        played.run()
        return played.received

    assert everything() == everything()
    first = everything()
    for other in (everything(seed=1), everything(context="run/2")):
        for stage, i in itertools.product(STAGES[:3], range(20)):
            assert first[stage][i] != other[stage][i]


def test_a_participant_lives_on_in_its_state():
    played = Round(Topology(), list(range(8)), 30, lost={"mask": {4}})

    class Fresh(dict):
        """Each access makes the participant anew from the state that the last one left."""

        states: dict = {}  # noqa: RUF012

        def __getitem__(self, client):
            last = self.states.get(client)
            made = played.participant(client, last.state() if last else None)
            assert all(isinstance(v, bytes) for v in made.state().values())
            self.states[client] = made
            return made

    played.participants = Fresh()
    got = played.run()
    assert got.tobytes() == played.plain_sum([i for i in range(8) if i != 4]).tobytes()


# What the server gets to see


def test_a_masked_vector_is_uniform_whatever_it_hides():
    played = Round(SPARSE, list(range(20)), 20_000, np.uint64)
    played.vectors = {i: np.full(20_000, i, np.uint64) for i in played.ids}
    played.until_masked()
    for client in played.ids:
        for dtype in (np.uint64, np.uint32):
            assert chi_square(np.frombuffer(played.received["mask"][client], dtype)) < UNIFORM
    pairs = [np.frombuffer(played.received["mask"][i], np.uint64) for i in played.ids]
    for a, b in itertools.combinations(pairs[:8], 2):
        assert chi_square(a - b) < UNIFORM and chi_square(a + b) < UNIFORM


def reachable(thing, seen):
    """All bytes and arrays that can be reached from an object."""
    if id(thing) in seen:
        return
    seen[id(thing)] = thing
    if isinstance(thing, bytes | bytearray):
        yield bytes(thing)
    elif isinstance(thing, np.ndarray):
        yield thing.tobytes()
    elif isinstance(thing, dict):
        for pair in thing.items():
            yield from reachable(pair, seen)
    elif isinstance(thing, list | tuple | set | frozenset):
        for part in thing:
            yield from reachable(part, seen)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        yield from reachable(vars(thing), seen)


@pytest.mark.parametrize("lost", [{}, {"mask": {1, 4}}, {"share": {2}, "mask": {7}, "unmask": {9}}])
def test_nothing_the_server_holds_contains_or_resembles_a_single_vector(lost):
    length = 4096
    played = Round(SPARSE, list(range(24)), length, lost=lost)
    small = generator("small")
    played.vectors = {i: small.normal(0, 1000, length).astype(np.int64).astype(np.uint32) for i in played.ids}
    total = played.run()
    held = list(reachable([played.received, played.coordinator], {}))
    assert sum(len(blob) >= total.nbytes for blob in held) > len(played.coordinator.survivors)
    everything = b"|".join(held)
    for vector in played.vectors.values():
        plain = vector.tobytes()
        assert not any(plain[at : at + 24] in everything for at in range(0, len(plain), 240))
    seen = np.stack([np.frombuffer(blob, np.int32) for blob in held if len(blob) == total.nbytes])
    correlation = np.corrcoef(np.stack(list(played.vectors.values())).view(np.int32), seen)[:24, 24:]
    # of independent vectors of 4096 entries, |correlation| > 0.12 has probability 1.5e-14; about 1,000 are looked at
    assert np.abs(correlation).max() < 0.12
    # the search does find a plain vector where there is one
    assert played.vectors[0].tobytes()[:24] in b"|".join(reachable([played.vectors], {}))


def rebuilt(played, client, name):
    """A client's secret as the server can rebuild it from the shares it received in the last stage."""
    around = played.coordinator._neighbours[client]
    answers = {i: unpack(m) for i, m in played.received["unmask"].items()}
    shares = {at + 1: answers[j][client] for at, j in enumerate(around) if client in answers.get(j, {})}
    secret = shamir.combine(shares, played.coordinator._plan.threshold)
    assert secret == played.participants[client]._own(name)
    return secret


def without_pair_masks(played, client, secret, masked):
    out = np.frombuffer(masked, np.uint32).copy()
    for peer in unpack(played.sent["mask"][client]):
        keys = played.received["advertise"][peer]
        ids = min(client, peer), max(client, peer)
        seed = agree(X25519PrivateKey.from_private_bytes(secret), keys[32:64], "mask", played.context, *ids)
        add_mask(out, seed, -1 if client < peer else 1)
    return out


def test_a_vector_that_comes_too_late_stays_hidden_by_its_own_mask():
    played = Round(SPARSE, list(range(20)), 20_000, lost={"mask": {6}})
    played.vectors[6] = np.arange(20_000, dtype=np.uint32)
    played.run()
    late = played.all_masked[6]
    with pytest.raises(ShoalError, match="too late"):
        played.coordinator.add(6, late)
    stripped = without_pair_masks(played, 6, rebuilt(played, 6, "mask key"), late)
    assert chi_square(stripped) < UNIFORM
    add_mask(stripped, played.participants[6]._own("own mask"), -1)
    assert stripped.tobytes() == played.vectors[6].tobytes()  # that mask is all that hides it


def test_a_vector_in_the_sum_stays_hidden_by_the_pair_masks():
    played = Round(SPARSE, list(range(20)), 20_000, lost={"mask": {6}})
    played.vectors[3] = np.arange(20_000, dtype=np.uint32)
    played.run()
    known = np.frombuffer(played.received["mask"][3], np.uint32).copy()
    add_mask(known, rebuilt(played, 3, "own mask"), -1)
    assert chi_square(known) < UNIFORM
    assert without_pair_masks(played, 3, played.participants[3]._own("mask key"), known.tobytes()).tolist()[:5] == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip


def test_the_server_gets_one_kind_of_share_for_each_client():
    played = Round(SPARSE, list(range(20)), 5, lost={"mask": {6, 8}})
    played.run()
    for client in played.ids:
        around = played.coordinator._neighbours[client]
        secrets = [played.participants[client]._own(name) for name in ("mask key", "own mask")]
        seen = {at + 1: unpack(played.received["unmask"][j]) for at, j in enumerate(around) if j not in (6, 8)}
        got = shamir.combine({x: m[client] for x, m in seen.items()}, played.coordinator._plan.threshold)
        assert got == secrets[client not in (6, 8)]


# Refusals


def test_too_many_dropouts_end_the_round_before_anything_is_unmasked():
    played = Round(Topology(), list(range(10)), 20, lost={"mask": {0, 1, 2, 3, 4}})
    assert played.coordinator.topology.plan(10).threshold == 5
    played.until_masked()
    with pytest.raises(TooFewClients, match=r"4 neighbours .* 5 of 9 are needed"):
        played.finish()
    assert "unmask" not in played.received


@pytest.mark.parametrize(("stage", "match"), [("share", "sent shares"), ("unmask", "gave their shares")])
def test_too_many_dropouts_at_other_stages(stage, match):
    played = Round(Topology(), list(range(10)), 20, lost={stage: {0, 1, 2, 3, 4, 5}})
    with pytest.raises(TooFewClients, match=match):
        played.run()


def test_too_few_clients_to_begin_with():
    played = Round(Topology(), list(range(10)), 20, lost={"advertise": set(range(7))})
    with pytest.raises(TooFewClients, match="3 clients advertised in run/1"):
        played.run()


def test_no_vector_at_all():
    played = Round(Topology(), list(range(10)), 20, lost={"mask": set(range(10))})
    with pytest.raises(TooFewClients, match="No masked vector"):
        played.run()


def test_a_participant_refuses_to_share_masks_or_to_unmask_below_the_threshold():
    played = Round(Topology(), list(range(10)), 20)
    played.until_masked()
    inbox = unpack(played.sent["mask"][0])
    few = dict(list(inbox.items())[:4])
    other = played.participant(0)
    other.share(played.sent["share"][0])
    with pytest.raises(ShoalError, match="4 of its neighbours sent shares, and the threshold is 5"):
        other.mask(played.vectors[0], pack(few))
    request = {j: IN_SUM if at < 4 else DROPPED for at, j in enumerate(inbox)}
    with pytest.raises(ShoalError, match="4 of its neighbours are in the sum, and the threshold is 5"):
        played.participants[0].unmask(pack(request))


def test_a_participant_never_gives_both_shares_of_a_client():
    played = Round(Topology(), list(range(10)), 20)
    played.until_masked()
    participant, peers = played.participants[0], range(1, 10)
    first = pack({j: IN_SUM if j < 9 else DROPPED for j in peers})
    answer = participant.unmask(first)
    assert participant.unmask(first) == answer
    for second in (dict.fromkeys(peers, IN_SUM), dict.fromkeys(range(2, 10), IN_SUM)):
        with pytest.raises(ShoalError, match="answers one only"):
            participant.unmask(pack(second))
    both = pack({9: IN_SUM}) + pack({9: DROPPED})
    with pytest.raises(ShoalError, match="bad part for client 9"):
        played.participant(1, played.participants[1].state()).unmask(pack(dict.fromkeys(range(2, 9), IN_SUM)) + both)


def test_a_participant_masks_one_vector_only():
    played = Round(Topology(), list(range(10)), 20)
    played.until_masked()
    participant, inbox = played.participants[0], played.sent["mask"][0]
    assert participant.mask(played.vectors[0], inbox) == played.received["mask"][0]
    with pytest.raises(ShoalError, match="another vector"):
        participant.mask(played.vectors[0] + np.uint32(1), inbox)
    with pytest.raises(ShoalError, match="another shares"):
        participant.mask(played.vectors[0], pack(dict(list(unpack(inbox).items())[1:])))


def test_a_participant_answers_one_roster_only_and_works_its_threshold_out_itself():
    played = Round(Topology(), list(range(10)), 20)
    played.until_masked()
    roster = played.sent["share"][0]
    with pytest.raises(ShoalError, match="another roster"):
        played.participants[0].share(roster[:4] + pack({**unpack(roster[4:]), 9: bytes([9]) * 64}))
    fresh = played.participant(0)
    with pytest.raises(ShoalError, match="is given 9 neighbours; of 12 clients it must have 11"):
        fresh.share((12).to_bytes(4, "little") + roster[4:])
    with pytest.raises(ShoalError, match="is given 9 neighbours"):
        fresh.share(roster[:4] + pack({**dict(list(unpack(roster[4:]).items())[1:]), 0: bytes(64)}))


def test_stages_come_in_order():
    played = Round(Topology(), list(range(10)), 20)
    played.until_masked()
    with pytest.raises(ShoalError, match="out of order: it has seen no roster"):
        played.participant(0).mask(played.vectors[0], played.sent["mask"][0])
    with pytest.raises(ShoalError, match="out of order: it has seen no shares"):
        played.participant(0, {"roster": played.sent["share"][0]}).unmask(pack({}))


def test_only_neighbours_shares_can_be_asked_for():
    played = Round(Topology(), list(range(10)), 20)
    played.until_masked()
    with pytest.raises(ShoalError, match=r"clients \[44\] are no neighbours"):
        played.participants[0].unmask(pack({**dict.fromkeys(range(1, 10), IN_SUM), 44: DROPPED}))
    with pytest.raises(ShoalError, match="can't give"):
        played.participants[0].unmask(pack(dict.fromkeys(range(1, 10), b"\x02")))


def test_a_tampered_ciphertext_is_refused():
    played = Round(Topology(), list(range(10)), 20)
    played.until_masked()
    inbox = unpack(played.sent["mask"][0])
    for at in (0, 12, 50, len(inbox[3]) - 1):
        bad = bytearray(inbox[3])
        bad[at] ^= 1
        fresh = played.participant(0)
        fresh.share(played.sent["share"][0])
        with pytest.raises(ShoalError, match="altered"):
            fresh.mask(played.vectors[0], pack({**inbox, 3: bytes(bad)}))
    with pytest.raises(ShoalError, match="altered"):
        played.participant(0, {"roster": played.sent["share"][0]}).mask(played.vectors[0], pack({**inbox, 3: inbox[4]}))


def test_shares_of_another_round_are_refused_even_with_the_same_keys():
    """The worst case: secrets used twice, so that only the name of the round differs."""
    first, second = (Round(Topology(), list(range(10)), 20, context=f"run/{k}") for k in (1, 2))
    first.until_masked()
    for i in second.ids:
        second.participants[i]._secret = first.participants[i]._secret
    second.until_masked()
    fresh = second.participant(0)
    fresh._secret = first.participants[0]._secret
    fresh.share(second.sent["share"][0])
    with pytest.raises(ShoalError, match="another sender, receiver or round"):
        fresh.mask(second.vectors[0], first.sent["mask"][0])


def test_what_cannot_be_read_is_a_dropout_with_a_reason():
    played = Round(Topology(), list(range(10)), 20)
    c, p = played.coordinator, played.participants
    advertised = {i: p[i].advertise() for i in played.ids}
    rosters = c.rosters({**advertised, 4: b"short"})
    assert sorted(rosters) == [i for i in range(10) if i != 4] and "5 bytes" in c.refused[4]
    shares = {i: p[i].share(m) for i, m in rosters.items()}
    inboxes = c.inboxes({**shares, 5: shares[6]})
    assert 5 not in inboxes and "not for its neighbours" in c.refused[5]
    masked = {i: p[i].mask(played.vectors[i], m) for i, m in inboxes.items()}
    with pytest.raises(ShoalError, match="80 were expected"):
        c.add(0, masked[0] + b"x")
    for i, m in masked.items():
        c.add(i, m)
    with pytest.raises(ShoalError, match="twice"):
        c.add(0, masked[0])
    with pytest.raises(ShoalError, match="without shares"):
        c.add(5, masked[0])
    answers = {i: p[i].unmask(m) for i, m in c.requests().items()}
    total = c.total({**answers, 7: answers[8], 5: b"stray"})
    assert "one share for each neighbour" in c.refused[7]
    assert total.tobytes() == played.plain_sum(masked).tobytes()


@pytest.mark.parametrize("dropped", [set(), {3}])
def test_an_altered_share_is_noticed(dropped):
    """Of the own mask (against its hash) and of a mask key (against the public key)."""
    played = Round(Topology(), list(range(10)), 20, lost={"mask": dropped})
    played.until_masked()
    answers = {i: played.participants[i].unmask(m) for i, m in played.coordinator.requests().items()}
    parts = unpack(answers[0])
    parts[3] = bytes([parts[3][0] ^ 1]) + parts[3][1:]
    with pytest.raises(ShoalError, match="share of client 3's secrets was altered"):
        played.coordinator.total({**answers, 0: pack(parts)})


@pytest.mark.parametrize("vector", [np.zeros(3), np.zeros(3, np.int32), np.zeros((3, 1), np.uint32)])
def test_only_encoded_vectors_are_masked(vector):
    played = Round(Topology(), list(range(4)), 3)
    played.until_masked()
    with pytest.raises(ShoalError, match="to be masked must be"):
        played.participants[0].mask(vector, played.sent["mask"][0])


def test_a_secret_has_32_bytes():
    from privacy.secure_aggregation.protocol import Participant

    with pytest.raises(ShoalError, match="must have 32"):
        Participant(Topology(), 0, "run/1", b"short")
