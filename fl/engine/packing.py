"""Many message contents in one, each distinct record once.

A packed content holds the ArrayRecord ``cohort``, whose array ``index`` is JSON: a header, and for each content the
numbers of its records. Within a process the records themselves follow, named ``0``, ``1``, ...: nothing is
serialised or copied. For a wire they are serialised (Flower's protobuf) and joined into one array, ``blob``, because
Flower sends every record and every array as an object of its own. Nothing is unpickled.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fl.engine.flower import quick_record

Content = RecordDict | Error
Record = ArrayRecord | ConfigRecord | MetricRecord


def pack(contents: Sequence[Content], header: dict[str, Any], *, join: bool) -> RecordDict:
    """One content that holds ``contents``, in order, and the JSON-able ``header``.

    A record that several contents share (the same object, or with ``join`` arrays over the same bytes) is in it once.
    """
    numbers: dict[Any, int] = {}
    records: list[Record] = []

    def number_of(record: Record) -> int:
        number = numbers.setdefault(_identity(record) if join else id(record), len(records))
        if number == len(records):
            records.append(record)
        return number

    table = [
        {"code": content.code, "reason": content.reason}
        if isinstance(content, Error)
        else [[name, number_of(record)] for name, record in content.items()]
        for content in contents
    ]
    index: dict[str, Any] = {"header": header, "contents": table}
    if not join:
        cohort = ArrayRecord({"index": _array(json.dumps(index).encode())})
        return quick_record(RecordDict, {"cohort": cohort} | {str(i): record for i, record in enumerate(records)})
    blobs = [recorddict_to_proto(RecordDict({"": record})).SerializeToString() for record in records]
    index["lengths"] = [len(blob) for blob in blobs]
    arrays = {"index": _array(json.dumps(index).encode()), "blob": _array(b"".join(blobs))}
    return RecordDict({"cohort": ArrayRecord(arrays)})


def unpack(packed: RecordDict) -> tuple[dict[str, Any], list[Content]]:
    """The header and the contents. No two contents share a record, only array bytes, which are immutable.

    What does not hold together raises (anything; its sender chose the bytes, so catch `Exception`).
    """
    arrays = packed["cohort"]
    if not isinstance(arrays, ArrayRecord):
        raise TypeError("cohort must be an ArrayRecord")
    index = json.loads(arrays["index"].data)
    record = _split(arrays["blob"].data, index["lengths"]) if "blob" in arrays else lambda number: packed[str(number)]
    given: set[int] = set()

    def own(number: int) -> Record:
        if number in given:
            return own_record(record(number))
        given.add(number)
        return record(number)

    contents: list[Content] = []
    for entry in index["contents"]:
        if isinstance(entry, dict):
            contents.append(Error(int(entry["code"]), None if entry["reason"] is None else str(entry["reason"])))
        else:
            contents.append(quick_record(RecordDict, {str(name): own(number) for name, number in entry}))
    return dict(index["header"]), contents


def own_record(record: Record) -> Record:
    """A copy of ``record`` that shares nothing which can be changed: only the bytes of its arrays."""
    if isinstance(record, ArrayRecord):
        return quick_record(ArrayRecord, {name: copy.copy(array) for name, array in record.items()})
    kind: Any = type(record)
    return quick_record(kind, {name: list(v) if isinstance(v, list) else v for name, v in record.items()})


def _array(data: bytes) -> Array:
    return Array("uint8", (len(data),), "shoal.bytes", data)


def _identity(record: Record) -> Any:
    """Equal for records that would serialise to the same bytes because they share them."""
    if isinstance(record, ArrayRecord):
        return tuple((name, a.dtype, a.shape, a.stype, id(a.data)) for name, a in record.items())
    return id(record)


def _split(blob: bytes, lengths: list[int]) -> Callable[[int], Record]:
    """A function from a record's number to the record, decoded once."""
    if sum(lengths) != len(blob):
        raise ValueError("the lengths in the index do not add up to the blob")
    ends, end = [], 0
    for length in lengths:
        ends.append(end := end + length)
    decoded: dict[int, Record] = {}

    def record(number: int) -> Record:
        if number not in decoded:
            data = blob[ends[number] - lengths[number] : ends[number]]
            decoded[number] = recorddict_from_proto(ProtoRecordDict.FromString(data))[""]
        return decoded[number]

    return record
