"""The wire form: exact round trips, shared bytes, exact sizes, and clear refusals."""

import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fl.keys import generator
from fl.messages import (
    VECTOR_STYPE,
    EvaluateReply,
    EvaluateRequest,
    MalformedMessage,
    SecureRequest,
    TrainReply,
    TrainRequest,
    freeze,
    payload_bytes,
)

VECTOR = np.array([1.5, -0.0, np.float32(1e-45), np.nan, np.inf, 3e38], dtype=np.float32)


def reply(**changes) -> TrainReply:
    values = {"client": 3, "round": 7, "version": 6, "layout": "abc", "update": VECTOR}
    numbers = {"examples": 40, "steps": 5, "tokens": 900, "loss": 0.5}
    return TrainReply(**{**values, **numbers, **changes})


def over_a_wire(record: RecordDict) -> RecordDict:
    data = recorddict_to_proto(record).SerializeToString()
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


@pytest.mark.parametrize("wire", [False, True])
@pytest.mark.parametrize("kind", [TrainRequest, EvaluateRequest])
def test_a_request_comes_back_bit_for_bit(kind, wire):
    sent = kind(3, 7, 6, VECTOR, "abc", {"lr": 0.1, "steps": 5, "mode": "full", "resume": True})
    record = over_a_wire(sent.to_record()) if wire else sent.to_record()
    got = kind.from_record(record)
    assert (got.client, got.round, got.version, got.layout) == (3, 7, 6, "abc")
    assert got.extra == {"lr": 0.1, "steps": 5, "mode": "full", "resume": True}
    assert [type(v) for v in got.extra.values()] == [float, int, str, bool]
    assert got.state.tobytes() == VECTOR.tobytes()
    assert got.state.dtype == np.float32


@pytest.mark.parametrize("wire", [False, True])
def test_a_train_reply_comes_back_bit_for_bit(wire):
    record = reply(extra={"k": 2}).to_record()
    got = TrainReply.from_record(over_a_wire(record) if wire else record)
    assert got.update.tobytes() == VECTOR.tobytes()
    assert (got.examples, got.steps, got.tokens, got.loss, got.extra) == (40, 5, 900, 0.5, {"k": 2})
    assert (got.client, got.round, got.version, got.layout) == (3, 7, 6, "abc")


ARRAYS = {
    "uint8": np.array([0, 255, 7], np.uint8),
    "uint32": np.array([0, 2**32 - 1], np.uint32),
    "uint64": np.array([2**64 - 1, 1], np.uint64),
    "float32": VECTOR,
    "empty": np.zeros(0, np.uint32),
}


@pytest.mark.parametrize("wire", [False, True])
@pytest.mark.parametrize("kind", [TrainRequest, SecureRequest])
def test_named_arrays_come_back_bit_for_bit(kind, wire):
    sent = kind(3, 7, 6, VECTOR, "abc", {"stage": "keys"}, ARRAYS)
    for message in (sent, reply(arrays=ARRAYS)):
        record = over_a_wire(message.to_record()) if wire else message.to_record()
        got = type(message).from_record(record)
        assert got.arrays.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert (got.arrays[name].dtype, got.arrays[name].tobytes()) == (array.dtype, array.tobytes())


def test_without_named_arrays_a_message_is_what_it_was():
    assert set(reply().to_record()) == {"state", "header", "metrics"}
    assert reply().to_record().keys() | {"arrays"} == reply(arrays=ARRAYS).to_record().keys()


def test_the_size_of_named_arrays_is_counted():
    for arrays in (ARRAYS, {"masked": np.zeros(100_000, np.uint32)}, {"x": np.zeros(0, np.uint8)}):
        record = reply(arrays=arrays).to_record()
        assert payload_bytes(record) == len(recorddict_to_proto(record).SerializeToString())


@pytest.mark.parametrize(
    "bad", [np.zeros(3, np.float16), np.zeros((2, 2), np.uint8), np.zeros(3, np.int32), np.array(["a"])]
)
def test_arrays_of_other_kinds_are_not_sent(bad):
    with pytest.raises(TypeError, match="array x must be 1-d of float32"):
        reply(arrays={"x": bad}).to_record()


@pytest.mark.parametrize("wire", [False, True])
def test_a_loss_that_is_kept_secret_is_not_in_the_message(wire):
    record = reply(loss=None).to_record()
    assert "loss" not in record["metrics"]
    assert TrainReply.from_record(over_a_wire(record) if wire else record).loss is None
    assert payload_bytes(record) < payload_bytes(reply().to_record())


@pytest.mark.parametrize("wire", [False, True])
def test_an_evaluate_reply_comes_back(wire):
    sent = EvaluateReply(3, 7, 6, 20, 0.25, {"correct": 15, "support": [5, 15], "tokens": 2.5})
    got = EvaluateReply.from_record(over_a_wire(sent.to_record()) if wire else sent.to_record())
    assert (got.client, got.round, got.version, got.examples, got.loss) == (3, 7, 6, 20, 0.25)
    assert got.metrics == {"correct": 15, "support": [5, 15], "tokens": 2.5}


def test_a_record_holds_exactly_the_documented_things():
    record = reply().to_record()
    assert list(record) == ["state", "header", "metrics"]
    assert isinstance(record["state"], ArrayRecord)
    assert isinstance(record["header"], ConfigRecord)
    assert isinstance(record["metrics"], MetricRecord)
    array = record["state"]["vector"]
    assert (array.dtype, array.shape, array.stype) == ("float32", (6,), VECTOR_STYPE)
    assert array.data == VECTOR.astype("<f4").tobytes()
    assert set(record["header"]) == {"kind", "client", "round", "version", "layout"}
    assert set(record["metrics"]) == {"examples", "steps", "tokens", "loss"}


def test_numbers_of_numpy_become_plain_ones():
    record = reply(examples=np.int64(4), loss=np.float32(0.5), client=np.int32(1)).to_record()
    assert type(record["metrics"]["examples"]) is int
    assert type(record["metrics"]["loss"]) is float
    assert type(record["header"]["client"]) is int


def test_a_broadcast_shares_one_copy_of_the_vector():
    size = 250_000
    state = freeze(np.zeros(size, np.float32))
    tracemalloc.start()
    records = [TrainRequest(c, 1, 1, state, "abc").to_record() for c in range(1000)]
    decoded = [TrainRequest.from_record(r).state for r in records]
    grown = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({id(r["state"]["vector"].data) for r in records}) == 1
    assert all(np.shares_memory(d, state) for d in decoded)
    assert grown < 10 * 4 * size  # a thousand vectors would be a hundred times this


def test_what_was_decoded_is_frozen_already():
    got = TrainRequest.from_record(TrainRequest(1, 1, 1, VECTOR, "abc").to_record()).state
    assert freeze(got) is got
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 1


@pytest.mark.parametrize(
    "vector",
    [
        np.arange(6, dtype=np.float32),
        np.arange(6, dtype=np.float64),
        np.arange(6, dtype=">f4"),
        np.arange(12, dtype=np.float32)[::2],
        np.frombuffer(np.arange(6, dtype="<f4").tobytes(), "<f4")[::-1],
        np.frombuffer(np.arange(6, dtype="<f4").tobytes(), "<f4")[1:],
        np.frombuffer(np.arange(6, dtype="<i4").tobytes(), "<i4"),
        np.frombuffer(bytearray(24), "<f4"),
        np.frombuffer(bytes(range(24)), "<f4", count=3),
        np.ndarray((6,), "<f4", bytes(range(24)), offset=20, strides=(-4,)),
        np.zeros(0, np.float32),
    ],
    ids=[
        "plain",
        "float64",
        "big-endian",
        "strided",
        "reversed",
        "part",
        "integers",
        "bytearray",
        "start",
        "backwards",
        "empty",
    ],
)
def test_freezing_keeps_the_values_and_nothing_else(vector):
    frozen = freeze(vector)
    np.testing.assert_array_equal(frozen, vector.astype(np.float32))
    assert not np.shares_memory(frozen, vector)
    np.testing.assert_array_equal(
        TrainRequest.from_record(TrainRequest(0, 1, 0, vector, "a").to_record()).state, vector
    )


def test_freezing_does_not_follow_later_changes():
    vector = np.zeros(3, np.float32)
    record = TrainRequest(0, 1, 0, vector, "a").to_record()
    vector[:] = 1
    assert TrainRequest.from_record(record).state.tolist() == [0, 0, 0]


def test_only_a_flat_vector_can_be_sent():
    with pytest.raises(ValueError, match="flat vector"):
        TrainRequest(0, 1, 0, np.zeros((2, 3), np.float32), "a").to_record()


def test_extra_values_are_scalars():
    with pytest.raises(TypeError, match="extra value lr"):
        TrainRequest(0, 1, 0, VECTOR, "a", {"lr": [0.1]}).to_record()  # type: ignore[dict-item]


def test_metrics_can_not_shadow_fields():
    with pytest.raises(ValueError, match="examples"):
        EvaluateReply(0, 1, 0, 5, 0.5, {"examples": 3}).to_record()


def array(data: bytes, shape=None, dtype="float32", stype=VECTOR_STYPE) -> Array:
    return Array(dtype, (len(data) // 4,) if shape is None else shape, stype, data)


def broken(name, value):
    def change(record: RecordDict) -> RecordDict:
        part, _, key = name.partition(".")
        if value is None:
            if key:
                del record[part][key]
            else:
                del record[part]
        elif key:
            record[part].__dict__["_data"][key] = value  # past Flower's checks, as on a wire
        else:
            record.__dict__["_data"][part] = value
        return record

    return change


def named(data, dtype="uint32", stype=None, shape=None) -> Array:
    return Array(dtype, shape or (len(data) // 4,), stype or f"shoal.{dtype}", data)


BROKEN = {
    "no state": (broken("state", None), "schema"),
    "no header": (broken("header", None), "schema"),
    "one record too many": (broken("more", ConfigRecord()), "schema"),
    "state is no array": (broken("state", ConfigRecord()), "schema"),
    "header is no config": (broken("header", MetricRecord()), "schema"),
    "two arrays": (broken("state.other", array(b"")), "schema"),
    "another array name": (broken("state", ArrayRecord({"weight": array(b"")})), "schema"),
    "pickled": (broken("state.vector", array(b"\x80\x04K\x01.", (1,), stype="pickle")), "schema"),
    "numpy file": (broken("state.vector", Array(np.zeros(6, np.float32))), "schema"),
    "float64": (broken("state.vector", array(bytes(24), (3,), dtype="float64")), "schema"),
    "cut short": (broken("state.vector", array(bytes(23), (6,))), "shape"),
    "not whole": (broken("state.vector", array(bytes(23), (5,))), "shape"),
    "matrix": (broken("state.vector", array(bytes(24), (2, 3))), "shape"),
    "negative shape": (broken("state.vector", array(bytes(24), (-6,))), "shape"),
    "another kind": (broken("header.kind", "train"), "schema"),
    "no kind": (broken("header.kind", None), "schema"),
    "no client": (broken("header.client", None), "schema"),
    "client is true": (broken("header.client", True), "schema"),
    "client is a float": (broken("header.client", 3.0), "schema"),
    "client beyond 64 bits": (broken("header.client", 2**63), "schema"),
    "layout is a number": (broken("header.layout", 5), "schema"),
    "unknown header": (broken("header.lr", 0.1), "schema"),
    "extra is a list": (broken("header.extra.lr", [0.1]), "schema"),
    "extra is bytes": (broken("header.extra.lr", b"x"), "schema"),
    "no examples": (broken("metrics.examples", None), "schema"),
    "examples is a float": (broken("metrics.examples", 40.0), "schema"),
    "examples is true": (broken("metrics.examples", True), "schema"),
    "loss is a list": (broken("metrics.loss", [0.5]), "schema"),
    "one metric too many": (broken("metrics.accuracy", 1.0), "schema"),
    "arrays are a header": (broken("arrays", ConfigRecord({"x": 1})), "schema"),
    "an array of another type": (broken("arrays", ArrayRecord({"x": named(bytes(8), "int64")})), "schema"),
    "an array of another stype": (broken("arrays", ArrayRecord({"x": named(bytes(8), stype="npy")})), "schema"),
    "an array that is not whole": (broken("arrays", ArrayRecord({"x": named(bytes(7))})), "shape"),
    "an array of another shape": (broken("arrays", ArrayRecord({"x": named(bytes(8), shape=(3,))})), "shape"),
    "an array that is a matrix": (broken("arrays", ArrayRecord({"x": named(bytes(8), shape=(1, 2))})), "shape"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_refused(name):
    change, part = BROKEN[name]
    record = change(reply().to_record())
    with pytest.raises(MalformedMessage) as caught:
        TrainReply.from_record(record)
    assert caught.value.part == part


@pytest.mark.parametrize(
    "change", [broken("header.layout", "abc"), broken("metrics.loss", None), broken("state", ArrayRecord())]
)
def test_a_broken_evaluation_is_refused(change):
    with pytest.raises(MalformedMessage):
        EvaluateReply.from_record(change(EvaluateReply(3, 7, 6, 20, 0.25).to_record()))


def random_record(seed: int) -> RecordDict:
    rng = generator(seed, "test-records")
    integers = [0, 1, -1, 63, -64, 64, 127, 128, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63), 2**63, 2**64 - 1]
    texts = ["", "a", "é" * 70, "x" * 127, "x" * 128, "x" * 20_000]
    scalars = [*integers, 0.0, -1.5, float("nan"), *texts, b"", b"\x00" * 200, True, False]
    lists = [[], [1, 2**62], [-5] * 200, [2**64 - 1, 1], [0.5] * 3, ["a", "é"], [b"x"], [True, False]]
    numbers = [v for v in scalars if isinstance(v, int | float) and not isinstance(v, bool)]

    def pick(values):
        return values[int(rng.integers(len(values)))]

    record = RecordDict()
    for _ in range(int(rng.integers(4))):
        shapes: list = [(), (3,), (0, 200), (2**31 - 1,), (-3, 1)]
        blobs = [bytes(int(rng.integers(300))) for _ in range(3)]
        arrays = {pick(texts): Array(pick(texts), pick(shapes), pick(texts), blob) for blob in blobs}
        config = {pick(texts): pick(scalars + lists) for _ in range(4)}
        metrics = {pick(texts): pick([*numbers, *lists[:5]]) for _ in range(4)}
        record[pick(texts) + str(len(record))] = pick(
            [ArrayRecord(arrays), ConfigRecord(config), MetricRecord(metrics)]
        )
    return record


def test_payload_bytes_is_the_serialised_size():
    for record in [reply().to_record(), EvaluateReply(1, 2, 3, 4, 0.5, {"c": [1]}).to_record(), RecordDict()]:
        assert payload_bytes(record) == len(recorddict_to_proto(record).SerializeToString())
    for seed in range(300):
        record = random_record(seed)
        assert payload_bytes(record) == len(recorddict_to_proto(record).SerializeToString()), record


@pytest.mark.parametrize("size", [0, 1, 31, 32, 4095, 4096, 524_287, 524_288])
def test_payload_bytes_at_the_edges_of_length_fields(size):
    record = TrainRequest(0, 1, 0, np.zeros(size, np.float32), "abc").to_record()
    assert payload_bytes(record) == recorddict_to_proto(record).ByteSize()


def test_payload_bytes_does_not_copy_the_vector():
    record = TrainRequest(0, 1, 0, np.zeros(2_500_000, np.float32), "abc").to_record()
    tracemalloc.start()
    payload_bytes(record)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
