"""Secure aggregation in rounds: what the server gets, that sums are right, what it costs, and what stops a round."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message
from flwr.app.message import make_message
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from clients.behaviours.faulty import Faulty
from fl.cli import main
from fl.clock import ticks
from fl.errors import RunStopped, ShoalError
from fl.fleet import Fleet
from fl.messages import SecureRequest, TrainReply, TrainRequest, payload_bytes
from fl.network import Instant, Uniform
from fl.run import resume
from fl.secure import KEYS, SHARES, UNMASK, SecureClients, make_codecs
from privacy.base import Guard
from privacy.secure_aggregation import protocol
from tests.fl.secure_rounds import (
    EXAMPLES,
    FEW,
    SIZE,
    SPACE,
    Trainer,
    leaks,
    loss_of,
    make,
    mean_of,
    play,
    remember,
    update_of,
    watch,
)
from tests.helpers import ENCODER, SHARED, final, go, rounds
from tests.test_resume import killed_at, moments, same_end

# A masked vector is uniform, so a correlation above this has probability 3e-12 (and few heavy numbers can't reach it);
# a test makes fewer than 1e5 comparisons.
CHANCE = 7 / SIZE**0.5
ONE_OF_MANY = 0.8  # the mean of k updates correlates with each of them, by about k^-0.5
EACH_STAGE = {(KEYS, 0), (SHARES, 1), ("train", 2), (UNMASK, 3)}
SLOW = Uniform(seconds_per_step=1.0, latency_s=0.01, down_mbps=None, up_mbps=None)


# What the server gets


CASES = {
    "everybody answers": {},
    "dropouts at every stage": {"lost": EACH_STAGE},
    "weights": {"weights": "examples", "lost": {("train", 5)}},
    "64 bits": {"secure": replace(FEW, modulus_bits=64), "lost": {(SHARES, 4)}},
    "a sparse graph": {"secure": replace(FEW, complete_up_to=0, security_bits=2.0, correctness_bits=0.2)},
}


@pytest.mark.parametrize("case", CASES)
def test_the_server_never_sees_a_single_update(case, monkeypatch):
    """No message that it pulls and no object that it holds, at any event, shows an update, a weight or a loss."""
    remember(monkeypatch)
    world = make(8, **CASES[case])
    pulled, held, events = watch(world, 2)
    assert [e["round"] for e in events if e["event"] == "round"] == [1, 2]
    assert len(pulled.arrays) > 200 and len(held.numbers) > 200
    for round in (1, 2):
        assert leaks(pulled, range(8), round, CHANCE) == []
        assert leaks(held, range(8), round, ONE_OF_MANY) == []
    assert all(e["loss"] is None for e in events)
    assert all(e["examples"] in (1, None) and not e["tokens"] for e in events if e["event"] == "client")


def test_a_masked_update_that_came_too_late_shows_nothing(monkeypatch):
    remember(monkeypatch)
    world = make(6, network=SLOW, trainer=Trainer(steps={4: 1000}))
    pulled, held, events = watch(world, 1, deadline_s=10)
    assert events[-1]["rejected"] == {"late": 1}
    assert leaks(pulled, range(6), 1, CHANCE) == [] == leaks(held, range(6), 1, ONE_OF_MANY)
    np.testing.assert_allclose(world.server.vector, mean_of([0, 1, 2, 3, 5], 1), atol=1e-6)


def test_the_inspection_finds_updates_that_are_sent_in_the_clear(monkeypatch):
    """Without secure aggregation, and with it but without masks: else the tests above would show nothing."""
    pulled, held, _ = watch(make(8, secure=None, weights="examples"))
    for client in range(8):
        for seen, limit in ((pulled, CHANCE), (held, ONE_OF_MANY)):
            found = " ".join(leaks(seen, [client], 1, limit))
            for what in ("float32 update", "correlates 1.00", str(EXAMPLES[client]), str(loss_of(client, 1))):
                assert what in found, what
    remember(monkeypatch)
    monkeypatch.setattr(protocol, "add_mask", lambda total, seed, sign=1: None)
    pulled, held, _ = watch(make(8))
    for client in range(8):
        for seen in (pulled, held):
            found = " ".join(leaks(seen, [client], 1, ONE_OF_MANY))
            assert "correlates 1.00" in found and "encoded update" in found and "1000 low bytes" in found


def test_low_bits_that_are_not_masked_are_found(monkeypatch):
    """Masks that leave the low byte as it is hide the correlation, and are found all the same."""
    remember(monkeypatch)
    add = protocol.add_mask

    def coarse(total, seed, sign=1):
        mask = np.zeros_like(total)
        add(mask, seed)
        total += (mask & np.array(~0xFF & 0xFFFFFFFF, total.dtype)) * (1 if sign > 0 else np.uint32(2**32 - 1))

    monkeypatch.setattr(protocol, "add_mask", coarse)
    pulled, _, _ = watch(make(6))
    found = leaks(pulled, [2], 1, CHANCE)
    assert found and all("1000 low bytes" in line for line in found)


def test_a_refusal_to_encode_tells_no_number():
    """What the quantiser says of a vector out of range is about the vector, and error replies go to the server."""
    texts = set()
    for size in (4.5678, 9.8765):
        world = make(6, trainer=Trainer(instead={3: np.full(SIZE, size, np.float32)}))
        play(world)
        texts |= {m.error.reason for m in world.grid.pulled if m.has_error()}
    assert len(texts) == 1
    assert "secure_aggregation.clip" in texts.pop()
    world = make(6, weights="examples", behaviour=Faulty(kind="huge_weight", clients=[3]))
    play(world)
    (text,) = {m.error.reason for m in world.grid.pulled if m.has_error()}
    assert "000" not in text


# Sums


@pytest.mark.parametrize("weights", ["uniform", "examples"])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("lost", [(), EACH_STAGE])
def test_a_sum_is_the_mean_of_those_in_it(weights, bits, lost):
    world = make(8, weights=weights, secure=replace(FEW, modulus_bits=bits), lost=lost)
    events = play(world)
    there = range(3, 8) if lost else range(8)
    weight = sum(EXAMPLES[c] for c in there) if weights == "examples" else len(there)
    scale = world.codecs(1).quantiser.scale
    bound = len(there) / scale / weight + 2**-25  # quantisation, and float32 of numbers below 0.5
    error = np.abs(world.server.vector - mean_of(there, 1, weights == "examples")).max()
    assert error <= bound < (2e-6 if bits == 32 else 4e-8)
    event = events[-1]
    assert (event["sampled"], event["accepted"]) == ((6, 5) if lost else (8, 8))
    assert event["client_steps"] == len(there)


def test_who_is_lost_where():
    events = play(make(8, lost=EACH_STAGE))
    assert [e["client"] for e in events if e["event"] == "client"] == list(range(2, 8))  # trained, or asked to
    assert [e["client"] for e in events if e.get("accepted") is True] == list(range(3, 8))
    assert events[-1]["rejected"] == {"error": 1}


BAD = ["nan", "inf", "wrong_shape", "oversize", "huge_norm", "wrong_version", "wrong_layout", "crash", "zero_weight"]


@pytest.mark.parametrize("kind", BAD)
def test_a_faulty_client_drops_out_and_the_others_sum_is_right(kind):
    world = make(6, weights="examples", behaviour=Faulty(kind=kind, clients=[2]))
    *_, event = play(world)
    assert (event["accepted"], sum(event["rejected"].values())) == (5, 1)
    np.testing.assert_allclose(world.server.vector, mean_of([0, 1, 3, 4, 5], 1, True), atol=1e-6)


def test_a_claimed_weight_does_not_count_where_weights_are_uniform():
    world = make(6, behaviour=Faulty(kind="huge_weight", clients=[2]))
    assert play(world)[-1]["accepted"] == 6
    np.testing.assert_allclose(world.server.vector, mean_of(range(6), 1), atol=1e-6)


# What it costs


def test_bytes_are_those_of_all_messages():
    world = make(6, lost={("train", 1), (UNMASK, 2)})
    *clients, event = play(world)
    down = sum(payload_bytes(m.content) for m in world.grid.sent)
    up = sum(payload_bytes(m.content) for m in world.grid.pulled if not m.has_error())
    assert (event["bytes_down"], event["bytes_up"]) == (down, up)
    trained = [m for m in world.grid.pulled if not m.has_error() and m.metadata.message_type == "train"]
    assert sum(e["bytes_up"] for e in clients) == sum(payload_bytes(m.content) for m in trained) < up
    assert len(world.grid.sent) == 3 * 6 + 5


def test_a_reply_that_is_lost_on_the_way_is_no_answer_and_costs_no_upload():
    class Losing(Fleet):
        def job(self, client, job, steps, down, up, *stage):
            times = super().job(client, job, steps, down, up, *stage)
            return replace(times, dropped_at=0) if (*stage, client) in {(SHARES, 1), (UNMASK, 2)} else times

    world = make(6)
    world.fleet = Losing(Instant(), world.seed, 6)
    *clients, event = play(world)
    assert [e["client"] for e in clients] == [0, 2, 3, 4, 5]
    np.testing.assert_allclose(world.server.vector, mean_of([0, 2, 3, 4, 5], 1), atol=1e-6)
    stages = [m for m in world.grid.pulled if m.metadata.message_type == "query"]
    sizes = [payload_bytes(m.content) for m in stages]
    lost = [sizes[6 + 1], sizes[12 + 1]]  # client 1 among the 6 of the second stage, client 2 among the 5 of the last
    assert event["bytes_up"] == sum(sizes) - sum(lost) + sum(e["bytes_up"] for e in clients)


def test_virtual_time_includes_the_stages():
    """Each stage takes as long as the slowest of those who answer it, and the deadline counts from the training."""
    network = Uniform(seconds_per_step=1.0, latency_s=0.25, down_mbps=0.1, up_mbps=0.05)
    world = make(6, network=network, lost={(KEYS, 0)})
    *clients, event = play(world, deadline_s=30.0)
    down = [payload_bytes(m.content) for m in world.grid.sent if m.content["header"]["client"]]  # all but client 0
    up = [payload_bytes(m.content) for m in world.grid.pulled if not m.has_error()]
    assert len(down) == len(up) == 4 * 5
    seconds = 0.0
    for at, stage in enumerate((KEYS, SHARES, "train", UNMASK)):
        steps = 1.0 if stage == "train" else 0.0
        sizes = zip(down[5 * at : 5 * at + 5], up[5 * at : 5 * at + 5])
        times = [(ticks(0.25 + 8 * d / 1e5) + ticks(steps) + ticks(0.25 + 8 * u / 5e4)) / 1e6 for d, u in sizes]
        if stage == "train":
            assert [e["virtual_s"] for e in clients] == pytest.approx([seconds + t for t in times], abs=5e-6)
        seconds += max(times)
    assert event["virtual_s"] == pytest.approx(seconds, abs=5e-6)
    assert seconds > 4 * 0.5 + 1


# What stops a round


@pytest.mark.parametrize("stage", [KEYS, SHARES, "train", UNMASK])
def test_too_many_dropouts_stop_the_run_and_open_nothing(stage):
    world = make(6, lost={(stage, c) for c in range(1, 6)})
    before = world.server
    with pytest.raises(RunStopped, match=r"Round 1 .*`shoal run --resume DIR` tries the round again") as caught:
        play(world)
    assert caught.value.exit_code == 3
    assert world.server is before
    asked = [m.content["header"].get("extra.stage") for m in world.grid.sent]
    assert (asked.count(UNMASK) > 0) == (stage == UNMASK)


def test_fewer_than_a_codec_needs_are_not_unmasked(monkeypatch):
    class Least(Guard):
        def codec(self, size, round):
            made = FEW.codec(size, 6, 1)
            made.least = 6
            return made

    world = make(6, guard=Least(), lost={("train", 5)})
    with pytest.raises(RunStopped, match=r"5 masked updates, and 6 are needed for the noise.*not opened"):
        play(world)
    assert all(m.content["header"].get("extra.stage") != UNMASK for m in world.grid.sent)
    play(make(6, guard=Least()))


# The client's half


def half(number: int = 6, seed: int = 3) -> SecureClients:
    return SecureClients(FEW, seed, make_codecs(FEW, Guard(), SPACE, number, 1), False)


ONE, OTHER = b"1" * 16, b"2" * 16


def asked(stage, message: bytes, client: int = 0, round: int = 1, session: bytes = ONE) -> SecureRequest:
    arrays = {"message": np.frombuffer(message, np.uint8), "session": np.frombuffer(session, np.uint8)}
    return SecureRequest(client, round, 0, np.zeros(0, np.float32), SPACE.layout.hash, {"stage": stage}, arrays)


def test_masks_are_new_in_every_process_but_answers_repeat():
    """A round that is tried again after a resume must not put another vector under the same mask."""
    one, other = half(), half()
    first = one.answer(asked(KEYS, b""))["message"].tobytes()
    assert one.answer(asked(KEYS, b""))["message"].tobytes() == first
    assert other.answer(asked(KEYS, b""))["message"].tobytes() != first
    assert one.answer(asked(KEYS, b"", round=2))["message"].tobytes() != first
    assert one.answer(asked(KEYS, b"", client=1, round=2))["message"].tobytes() != first
    secrets = set()
    for client, round, session in [(0, 3, ONE), (0, 4, ONE), (1, 3, ONE), (1, 3, OTHER), (1, 4, ONE)]:
        one.answer(asked(KEYS, b"", client, round, session))
        secrets.add(one.parts[client].secret)
    assert len(secrets) == 5  # each serves one session of one round


def test_a_round_that_is_over_is_not_taken_up_again():
    clients = half()
    clients.answer(asked(KEYS, b"", round=2))
    with pytest.raises(ShoalError, match="round 1 is closed"):
        clients.answer(asked(KEYS, b"", round=1))
    clients.answer(asked(KEYS, b"", client=1, round=1))


def test_another_session_of_a_round_is_a_round_of_its_own_and_the_one_before_is_over():
    clients = half()
    first = clients.answer(asked(KEYS, b""))["message"].tobytes()
    secret = clients.parts[0].secret
    for stage in (SHARES, UNMASK, "x"):
        with pytest.raises(ShoalError, match="no part in session jijiji"):
            clients.answer(asked(stage, b"", session=OTHER))
    assert clients.answer(asked(KEYS, b""))["message"].tobytes() == first
    assert clients.answer(asked(KEYS, b"", session=OTHER))["message"].tobytes() != first
    assert clients.parts[0].state == {} and clients.parts[0].secret != secret
    for stage in (KEYS, SHARES, UNMASK):  # late, or repeated by the network
        with pytest.raises(ShoalError, match="no part in session jhjhjh"):
            clients.answer(asked(stage, b""))
    assert clients.parts[0].session == OTHER
    clients.answer(asked(KEYS, b"", round=2))
    for wrong in (b"", ONE + b"x"):
        with pytest.raises(ShoalError, match="named by 16 bytes"):
            clients.answer(asked(KEYS, b"", round=2, session=wrong))


@pytest.mark.parametrize("at", [(), (UNMASK,), ("train", UNMASK)])
def test_a_server_started_anew_has_its_sum_from_nodes_that_were_not(at):
    """They have answered a round of the same number, up to its sum, and answer it again, under masks of its own."""
    world, anew = make(6, lost={(stage, c) for stage in at for c in range(1, 6)}), make(6)
    if at:
        with pytest.raises(RunStopped):
            play(world)
    else:
        play(world)
    anew.grid = world.grid
    sent = {m.metadata.src_node_id: m for m in world.grid.pulled if m.metadata.message_type == "train"}
    world.grid.lost, world.grid.pulled = {(KEYS, 2)}, []
    assert play(anew)[-1]["accepted"] == 5
    np.testing.assert_allclose(anew.server.vector, mean_of([0, 1, 3, 4, 5], 1), atol=1e-6)
    again = [m for m in world.grid.pulled if m.metadata.message_type == "train"]
    assert len(again) == 5
    for message in again:
        if not (was := sent[message.metadata.src_node_id]).has_error():
            one, two = (TrainReply.from_record(m.content).arrays["masked"] for m in (was, message))
            assert len(np.unique(two - one)) > 990  # of 1,001: the difference of two masks is as if it were drawn


def test_a_roster_beyond_what_the_sum_is_planned_for_is_refused():
    clients = half(6)
    clients.answer(asked(KEYS, b""))
    with pytest.raises(ShoalError, match="roster of 7 clients.*6 at most"):
        clients.answer(asked(SHARES, (7).to_bytes(4, "little")))


def test_a_second_update_in_a_round_is_refused():
    """A job that comes twice gets the same answer; another update would lie under the same mask, and is an error."""
    trainer = Trainer()
    world = make(6, trainer=trainer)
    play(world)
    asked_for = [m for m in world.grid.sent if m.metadata.message_type == "train"]
    first = [TrainReply.from_record(m.content) for m in world.grid.pulled if m.metadata.message_type == "train"]
    trainer.instead[1] = update_of(1, 9)
    again = [Message(m.content, m.metadata.dst_node_id, "train") for m in asked_for[:2]]
    same, other = world.grid.pull_messages(world.grid.push_messages(again))
    assert TrainReply.from_record(same.content).arrays["masked"].tobytes() == first[0].arrays["masked"].tobytes()
    assert "answered another vector" in other.error.reason


# Malformed messages


scalars = st.one_of(st.integers(-3, 9), st.floats(allow_nan=True), st.text(max_size=8), st.booleans())
byte_arrays = st.one_of(
    st.binary(max_size=400).map(lambda b: np.frombuffer(b, np.uint8)),
    st.binary(max_size=60).map(lambda b: np.frombuffer(b[: len(b) // 4 * 4], "<f4")),
    st.binary(max_size=60).map(lambda b: np.frombuffer(b[: len(b) // 8 * 8], "<u8")),
)


@hypothesis_settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    stage=st.one_of(st.sampled_from([KEYS, SHARES, UNMASK, "train"]), scalars),
    extra=st.dictionaries(st.sampled_from(["stage", "lr", "train", "sent", "x"]), scalars, max_size=3),
    arrays=st.dictionaries(st.sampled_from(["message", "inbox", "x"]), byte_arrays, max_size=3),
    client=st.integers(-2, 8),
    round=st.integers(-1, 3),
    prepared=st.booleans(),
)
def test_a_node_survives_every_message(stage, extra, arrays, client, round, prepared):
    """It answers or gives an error reply that is not a crash, whatever stage it is in; and goes on afterwards."""
    world = make(6)
    if prepared:
        world.exchange(world.server, 1, range(6))
    node_id = world.nodes[0]
    if stage == "train":
        header = {"lr": 0.1, "train": "adapter", "sent": "adapter", **{k: v for k, v in extra.items() if k == "x"}}
        made = TrainRequest(client, round, 0, np.zeros(SIZE, np.float32), SPACE.layout.hash, header, arrays)
        message = Message(made.to_record(), node_id, "train")
    else:
        made = SecureRequest(
            client, round, 0, np.zeros(0, np.float32), SPACE.layout.hash, {"stage": stage, **extra}, arrays
        )
        message = Message(made.to_record(), node_id, "query")
    (reply,) = world.grid.pull_messages(world.grid.push_messages([message]))
    if reply.has_error():
        assert "<class" not in str(reply.error.reason)  # how the grid reports an exception that a node let through
    else:
        TrainReply.from_record(reply.content)


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    where=st.sampled_from([KEYS, SHARES, "train", UNMASK]),
    change=st.sampled_from(["dtype", "cut", "longer", "flip", "absent", "another name", "two", "update", "empty"]),
    at=st.integers(0, 10_000),
)
def test_a_server_survives_every_reply(where, change, at):
    """A malformed reply is a dropout or stops the round; a sum that is given is that of the clients counted."""
    world = make(6)
    world.grid.pull_messages = altering(world, where, change, at)
    try:
        events = play(world)
    except RunStopped:
        return
    there = [e["client"] for e in events if e.get("accepted") is True]
    assert len(there) >= 5
    error = np.abs(world.server.vector - mean_of(there, 1))
    if (where, change) == ("train", "flip"):  # a client may send what it likes: no one can tell one coordinate
        error = np.sort(error)[:-1]
    assert error.max() < 1e-6


@pytest.mark.parametrize("at", [32, 63])
def test_a_mask_key_that_is_not_the_clients_own_stops_the_round(at):
    """Its masks don't cancel, and the sum is noise: that is seen, and the model stays as it was."""
    world = make(6)
    world.grid.pull_messages = altering(world, KEYS, "flip", 8 * at + 1)
    before = world.server
    with pytest.raises(RunStopped, match=r"Round 1 has no sum: What was unmasked is not the sum of 6 encoded updates"):
        play(world)
    assert world.server is before


def altering(world, where: str, change: str, at: int):
    """The grid's `pull_messages`, which changes what client 2 says in the stage ``where``."""
    pull, stages = world.grid.pull_messages, iter([KEYS, SHARES, "train", UNMASK])

    def pulled(ids):
        replies = pull(ids)
        if next(stages) == where:
            for i, message in enumerate(replies):
                if message.metadata.src_node_id == world.nodes[2]:
                    replies[i] = make_message(message.metadata, content=altered(message, change, at))
        return replies

    return pulled


def altered(message: Message, change: str, at: int):
    reply = TrainReply.from_record(message.content)
    ((name, array),) = reply.arrays.items()
    data = bytearray(array.tobytes())
    if change == "flip":
        data[at // 8 % len(data)] ^= 1 << at % 8
    made = {
        "dtype": {name: np.frombuffer(bytes(data[: len(data) // 8 * 8]), "<u8")},
        "cut": {name: array[: at % len(array)]},
        "longer": {name: np.append(array, array[:1])},
        "flip": {name: np.frombuffer(bytes(data), array.dtype)},
        "absent": {},
        "another name": {"x": array},
        "two": {name: array, "x": array},
        "update": {name: array},
        "empty": {name: array[:0]},
    }[change]
    update = np.ones(3, np.float32) if change == "update" else reply.update
    return replace(reply, arrays=made, update=update).to_record()


# Whole runs


PLAIN = ("clients.number=6", "local=sgd", "local.lr=0.1", "local.batch_size=4", "evaluation.every=2")
SECURE = ("secure_aggregation=secagg", *PLAIN)
RUNS = {
    "uniform": ("aggregator.weights=uniform",),
    "examples, fedadam": ("partition=dirichlet", "server_optimizer=fedadam", "server_optimizer.lr=0.01"),
    "rolora": ("adapter=rolora", "aggregator=rolora"),
    "ffa": ("adapter=ffa", "server_optimizer=fedavgm"),
    "fedsb": ("adapter=lora_xs", "aggregator=fedsb"),
    "fedsvd": ("adapter=ffa", "aggregator=fedsvd"),
}


def products(folder) -> np.ndarray:
    """What a run left: B A of each module, since factors of one product may differ, and the head."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    parts = []
    for name in sorted(n for n in tensors if "lora_B" not in n):
        found = tensors[name]
        parts.append(tensors[name.replace("lora_A", "lora_B")] @ found if "lora_A" in name else found)
    return np.concatenate([part.ravel() for part in parts])


@pytest.mark.parametrize("case", ["rolora", *(pytest.param(c, marks=pytest.mark.slow) for c in RUNS if c != "rolora")])
def test_a_secure_run_is_the_plain_run_within_quantisation(tmp_path, case):
    go(tmp_path / "plain", *PLAIN, *RUNS[case])
    go(tmp_path / "secure", *SECURE, *RUNS[case])
    plain, secure = products(tmp_path / "plain"), products(tmp_path / "secure")
    assert 0 < np.abs(plain - secure).max() < 1e-4 * np.abs(plain).max()
    for mine, other in zip(rounds(tmp_path / "secure"), rounds(tmp_path / "plain"), strict=True):
        for name in ("sampled", "accepted", "rejected", "client_steps"):
            assert mine[name] == other[name]
        assert mine["bytes_up"] > other["bytes_up"] and mine["bytes_down"] > other["bytes_down"]
        assert mine["update_norm"] == pytest.approx(other["update_norm"], rel=1e-3)


@pytest.mark.slow
def test_a_secure_run_that_is_killed_ends_the_same(tmp_path):
    more = (*SECURE, "network=lognormal", "network.dropout=0.05", "secure_aggregation.dropout=0.4", "seed=1")
    total = moments(tmp_path / "whole", *more)
    assert final(tmp_path / "whole")["rejected_updates"] or rounds(tmp_path / "whole")[-1]["sampled"] < 6
    for k in (total // 2, 3 * total // 4):
        killed_at(k, tmp_path / str(k), *more)
        resume(tmp_path / str(k), shared=SHARED, quiet=True)
        same_end(tmp_path / str(k), tmp_path / "whole")


def test_a_run_without_enough_clients_exits_3_and_says_why(tmp_path, capfd):
    words = [*ENCODER, *SECURE, "network.dropout=0.9", f"hydra.run.dir={tmp_path / 'run'}"]
    assert main(["run", *words]) == 3
    said = " ".join(capfd.readouterr().err.split())
    assert "Round 1 has no sum" in said and "Use more clients" in said


def test_the_records_say_what_the_server_saw(tmp_path):
    done = go(tmp_path / "run", *SECURE, "schedule.rounds=1")
    assert "never a single one" in done.run["privacy"]
    assert "number of local steps" in done.run["privacy"]
