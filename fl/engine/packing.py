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
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fl.engine.flower import quick_record

Content = RecordDict | Error
Record = ArrayRecord | ConfigRecord | MetricRecord
T = TypeVar("T")

# JSON takes up to 40 times its bytes in memory. A content's part of the index is names, numbers, or an error's text.
INDEX_BYTES, HEADER_BYTES, CONTENT_BYTES = 64 * 2**20, 64 * 2**10, 16 * 2**10
# Arrays and values in the records of all contents: few bytes can stand for many of them, and for many copies.
ITEMS, ITEMS_EACH = 10_000, 250


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


def unpack(packed: RecordDict, most_contents: int | None = None) -> tuple[dict[str, Any], list[Content]]:
    """The header and the contents. No two contents share a record, only array bytes, which are immutable.

    With ``most_contents``, more of them, or an index that is large for so many, are refused before they are read. Its
    sender chose the bytes: raises `ValueError` for all that `pack` never gives, before much is made of them.
    """
    try:
        return _unpacked(packed, most_contents)
    except ValueError:
        raise
    except Exception as error:  # of JSON, protobuf or Flower
        raise ValueError(f"it is not what is packed ({type(error).__name__}: {error!s:.100})") from error


def _unpacked(packed: RecordDict, most_contents: int | None) -> tuple[dict[str, Any], list[Content]]:
    arrays = packed["cohort"]
    if not isinstance(arrays, ArrayRecord):
        raise ValueError("cohort must be an ArrayRecord")
    text, most = arrays["index"].data, most_index(most_contents)
    if len(text) > most:
        raise ValueError(f"an index of {len(text)} bytes, and {most} at most are taken")
    index = json.loads(text)
    header, entries = _typed(index["header"], dict), _typed(index["contents"], list)
    if most_contents is not None and len(entries) > most_contents:
        raise ValueError(f"{len(entries)} contents for {most_contents} clients")
    if "blob" in arrays:
        record = _split(arrays["blob"].data, _typed(index["lengths"], list))
    else:
        record = _numbered(packed)
    given: set[int] = set()
    left = ITEMS + ITEMS_EACH * len(entries)

    def own(number: int) -> Record:
        nonlocal left
        found = record(number)
        left -= 1 + len(found)
        if left < 0:
            raise ValueError(f"more than {ITEMS} items in records, and {ITEMS_EACH} for each content")
        if number in given:
            return own_record(found)
        given.add(number)
        return found

    contents: list[Content] = []
    for entry in entries:
        if isinstance(entry, dict):
            reason = entry["reason"]
            contents.append(Error(_typed(entry["code"], int), None if reason is None else _typed(reason, str)))
        else:
            records: dict[str, Record] = {}
            for name, number in _typed(entry, list):
                if _typed(name, str) in records:
                    raise ValueError(f"two records {name!r:.40} in one content")
                records[name] = own(_typed(number, int))
            contents.append(quick_record(RecordDict, records))
    return header, contents


def most_index(contents: int | None) -> int:
    """The largest index in bytes that is taken for so many ``contents``; None: for any number."""
    return INDEX_BYTES if contents is None else min(INDEX_BYTES, HEADER_BYTES + CONTENT_BYTES * contents)


def _typed(value: Any, kind: type[T]) -> T:
    """``value``, which has to be a ``kind`` itself: a bool is no int."""
    if type(value) is not kind:
        raise ValueError(f"{value!r:.40} stands where a {kind.__name__} has to be")
    return value


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


def _numbered(packed: RecordDict) -> Callable[[int], Record]:
    """A function from a record's number to the record beside the index."""

    def record(number: int) -> Record:
        if str(number) not in packed:
            raise ValueError(f"there is no record {number!s:.40}")
        return packed[str(number)]

    return record


def _split(blob: bytes, lengths: list[int]) -> Callable[[int], Record]:
    """A function from a record's number to the record, decoded once."""
    ends, end = [], 0
    for length in lengths:
        if type(length) is not int or length < 0:
            raise ValueError(f"{length!r:.40} is no length")
        ends.append(end := end + length)
    if end != len(blob):
        raise ValueError("the lengths in the index do not add up to the blob")
    decoded: dict[int, Record] = {}

    def record(number: int) -> Record:
        if not 0 <= number < len(ends):
            raise ValueError(f"there is no record {number!s:.40} of {len(ends)}")
        if number not in decoded:
            decoded[number] = _record(blob[ends[number] - lengths[number] : ends[number]])
        return decoded[number]

    return record


def _record(data: bytes) -> Record:
    """The one record in the serialised ``data``."""
    proto = ProtoRecordDict.FromString(data)
    if len(proto.items) != 1:
        raise ValueError(f"{len(proto.items)} records where one has to be")
    (item,) = proto.items
    kind = item.WhichOneof("value")
    if kind is not None and len(getattr(item, kind).items) > ITEMS:
        raise ValueError(f"a record with more than {ITEMS} items")
    return recorddict_from_proto(proto)[""]
