"""What is packed comes back, each distinct record travels once, and Flower's own object model carries it."""

import json
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fl.engine.flower import ensure_identity
from fl.engine.packing import INDEX_BYTES, ITEMS, most_index, own_record, pack, unpack
from fl.messages import payload_bytes

JOINS = pytest.mark.parametrize("join", [False, True], ids=["shared", "joined"])


def contents() -> list:
    array = Array(np.arange(5, dtype=np.float32))
    values = {
        "i": -1,
        "u": 2**64 - 1,
        "f": float("inf"),
        "t": "\u00e9",
        "b": b"\x00\xff",
        "y": True,
        "l": [1, 2],
        "e": [],
    }
    return [
        RecordDict({"a": ArrayRecord({"x": array, "y": Array("f8", (2, 0), "other", b"")}), "c": ConfigRecord(values)}),
        Error(3, "why"),
        RecordDict(),
        Error(4, None),
        RecordDict({"m": MetricRecord({"n": 3, "f": 0.1, "l": [0.5]}), "a/b": ArrayRecord(), "": ConfigRecord()}),
    ]


@JOINS
def test_contents_come_back_in_order(join):
    header, got = unpack(pack(contents(), {"ids": ["a", "b"], "n": 1}, join=join))
    assert header == {"ids": ["a", "b"], "n": 1}
    assert got == contents()
    assert [list(c) for c in got if isinstance(c, RecordDict)] == [["a", "c"], [], ["m", "a/b", ""]]
    assert type(got[0]["c"]["y"]) is bool


@JOINS
def test_nothing_at_all_can_be_packed(join):
    assert unpack(pack([], {}, join=join)) == ({}, [])


@JOINS
def test_a_shared_record_is_packed_once_and_given_to_each(join):
    record = ArrayRecord({"x": Array(np.zeros(10_000, np.float32))})
    packed = pack([RecordDict({"a": record}) for _ in range(50)], {}, join=join)
    assert payload_bytes(packed) < 45_000
    got = [c["a"] for c in unpack(packed)[1]]
    assert all(r == record for r in got)
    assert len({id(r) for r in got}) == len({id(r["x"]) for r in got}) == 50
    assert len({id(r["x"].data) for r in got}) == 1


def test_joined_arrays_over_the_same_bytes_are_packed_once():
    data = bytes(40_000)

    def record(shape=(10_000,)):
        return RecordDict({"a": ArrayRecord({"x": Array("float32", shape, "s", data)})})

    assert payload_bytes(pack([record() for _ in range(50)], {}, join=True)) < 45_000
    other = RecordDict({"a": ArrayRecord({"x": Array("float32", (10_000,), "s", b"\x01" * 40_000)})})
    assert unpack(pack([record(), other], {}, join=True))[1] == [record(), other]
    mixed = [record(), record((100, 100)), record()]
    assert [c["a"]["x"].shape for c in unpack(pack(mixed, {}, join=True))[1]] == [(10_000,), (100, 100), (10_000,)]


def test_a_blob_has_the_length_that_its_index_says():
    packed = pack(contents(), {}, join=True)
    data = packed["cohort"]["blob"].data
    for wrong in (data + b"x", data[:-1]):
        packed["cohort"]["blob"] = Array("uint8", (len(wrong),), "s", wrong)
        with pytest.raises(ValueError, match="do not add up"):
            unpack(packed)


def altered(packed: RecordDict, **parts) -> RecordDict:
    """A packed content with other ``parts`` of its index, or with other bytes as its ``text`` or ``blob``."""
    arrays = {name: packed["cohort"][name].data for name in packed["cohort"]}
    arrays |= {"blob": parts.pop("blob")} if "blob" in parts else {}
    arrays["index"] = parts.pop("text", None) or json.dumps(json.loads(arrays["index"]) | parts).encode()
    made = ArrayRecord({name: Array("uint8", (len(data),), "s", data) for name, data in arrays.items()})
    return RecordDict({**dict(packed), "cohort": made})


LISTS = b'{"header":{},"contents":[' + b"[]," * 3_000_000 + b'[]],"lengths":[]}'
MALFORMED = {
    "a bool as number": {"contents": [[["a", True]]]},
    "a float as number": {"contents": [[["a", 1.0]]]},
    "a text as number": {"contents": [[["a", "1"]]]},
    "a number below zero": {"contents": [[["a", -1]]]},
    "a number beyond the records": {"contents": [[["a", 10**6]]]},
    "a name that is none": {"contents": [[[["a"], 1]]]},
    "one name twice": {"contents": [[["a", 0], ["a", 1]]]},
    "three in place of a name and a number": {"contents": [[["a", 0, 1]]]},
    "contents that are none": {"contents": {"a": 1}},
    "a content that is none": {"contents": ["ab"]},
    "no contents": {"contents": None},
    "an error without a code": {"contents": [{"reason": "why"}]},
    "a code that is none": {"contents": [{"code": "3", "reason": "why"}]},
    "a reason that is none": {"contents": [{"code": 3, "reason": [1]}]},
    "a header that is none": {"header": [["a", 1]]},
    "no JSON": {"text": b'{"header"'},
    "no text": {"text": b"\xff\xfe\xfd"},
    "a list": {"text": b"[]"},
    "deep nesting": {"text": b"[" * 60_000},
    "a long number": {"text": b'{"header":{},"contents":[],"lengths":[' + b"9" * 50_000 + b"]}"},
}


@JOINS
@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_malformed_is_a_value_error(join, what):
    with pytest.raises(ValueError):
        unpack(altered(pack(contents(), {}, join=join), **MALFORMED[what]), 5)


@pytest.mark.parametrize("lengths", [[-4, 4], [True, -1], [0.0], [2**70, -(2**70)], [1], ["0"], None, {"0": 0}])
def test_lengths_are_whole_numbers_that_add_up(lengths):
    with pytest.raises(ValueError):
        unpack(altered(pack([], {}, join=True), lengths=lengths))


def test_the_bytes_of_a_record_hold_one():
    one = pack([RecordDict({"a": ConfigRecord({"x": 1})})], {}, join=True)
    data = one["cohort"]["blob"].data
    for wrong in (data + data, b"", b"\xff\xff", data[:-1]):
        with pytest.raises(ValueError):
            unpack(altered(one, blob=wrong, lengths=[len(wrong)]))


def test_few_bytes_do_not_become_many():
    """An index of empty contents, one record that many contents name, and records of many items."""
    many = {f"{i}": Array("uint8", (0,), "s", b"") for i in range(2_000)}
    shared = altered(pack([RecordDict({"a": ArrayRecord(many)})], {}, join=True), contents=[[["a", 0]]] * 5_000)
    named = altered(shared, contents=[[[f"{i}", 0] for i in range(500)]])
    large = ArrayRecord({f"{i}": Array("uint8", (0,), "s", b"") for i in range(ITEMS + 1)})
    cases = [
        (altered(pack([], {}, join=True), text=LISTS), 4),
        (altered(shared, text=LISTS), 4),
        (shared, 4),
        (named, 1),
        (pack([RecordDict({"a": large})], {}, join=True), 1),
    ]
    for packed, most in cases:
        tracemalloc.start()
        try:
            with pytest.raises(ValueError):
                unpack(packed, most)
            assert tracemalloc.get_traced_memory()[1] < 30e6
        finally:
            tracemalloc.stop()


@JOINS
def test_as_many_contents_and_as_long_errors_as_clients_have_are_taken(join):
    many = [Error(1, "\u00e9" * 500), *(RecordDict({"state": ArrayRecord(), "m": MetricRecord({"n": 1})}),) * 40] * 3
    packed = pack(many, {}, join=join)
    assert unpack(packed, len(many))[1] == many
    with pytest.raises(ValueError, match="123 contents for 122 clients"):
        unpack(packed, len(many) - 1)
    assert most_index(None) == INDEX_BYTES > most_index(1000) > 1000 * most_index(1) / 6 > most_index(1)


def test_a_joined_content_is_two_arrays_whatever_is_in_it():
    packed = pack(contents() * 20, {}, join=True)
    assert list(packed) == ["cohort"]
    assert sorted(packed["cohort"]) == ["blob", "index"]


@JOINS
def test_flowers_object_model_carries_it(join):
    ensure_identity(1)
    message = Message(pack(contents(), {"n": 1}, join=join), 2, "train")
    objects = {name: value.deflate() for name, value in get_all_nested_objects(message).items()}
    inflated = inflate_object_from_contents(message.object_id, objects)
    assert unpack(inflated.content) == ({"n": 1}, contents())


def test_an_own_record_shares_only_bytes():
    array = ArrayRecord({"x": Array(np.zeros(3))})
    own = own_record(array)
    own["x"].dtype = "spoiled"
    own["y"] = own["x"]
    assert array["x"].dtype == "float64" and list(array) == ["x"]
    assert own["x"].data is array["x"].data
    for record in (ConfigRecord({"l": [1]}), MetricRecord({"l": [1.0]})):
        copied = own_record(record)
        assert type(copied) is type(record) and copied == record
        copied["l"].append(5)
        assert len(record["l"]) == 1
