"""What crosses the wire: one flat float32 vector, a header and a few numbers, as Flower records.

======== ============== ==========================================================================================
record   type           holds
======== ============== ==========================================================================================
state    ArrayRecord    one array ``vector``: d float32, little endian, raw bytes (stype ``shoal.f32``)
header   ConfigRecord   ``kind``, ``client``, ``round``, ``version``, ``layout``, and ``extra.NAME`` scalars
metrics  MetricRecord   what a reply reports: ``examples``, ``steps``, ``tokens``, ``loss``; empty in a request
arrays   ArrayRecord    further named arrays ``(n,)`` that a method sends in either direction; absent without any
======== ============== ==========================================================================================

``round`` numbers a client's jobs: (client, round) names one piece of work, whatever the schedule calls a round.
A vector is raw bytes in both directions, so decoding is ``np.frombuffer`` (no copy, read-only) and nothing is ever
unpickled. `freeze` a vector before broadcasting it: every request made from a frozen vector shares its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import config_record_to_proto

from fl.engine.flower import quick_record
from fl.errors import ShoalError

VECTOR_STYPE = "shoal.f32"
BUDGET = "privacy budget spent"  # how the error of a client that takes part no more begins
Scalar = int | float | str | bool
Metric = int | float | list[int] | list[float]

_FLOAT32 = np.dtype("<f4")
_KINDS = {name: np.dtype(name).newbyteorder("<") for name in ("float32", "float64", "uint8", "uint32", "uint64")}
_EXTRA = "extra."
_INT64 = range(-(2**63), 2**63)


class MalformedMessage(ShoalError):
    """A record does not hold what it should. ``part`` is what is wrong: ``schema`` or ``shape``."""

    def __init__(self, part: str, text: str):
        self.part = part
        super().__init__(text)


def freeze(vector: np.ndarray) -> np.ndarray:
    """A read-only copy ``(d,)`` of ``vector`` over one ``bytes`` object, which every record made from it shares.

    A vector that is frozen already (as every decoded one is) is returned as it is. Raises `ValueError` unless 1-d.
    """
    if _bytes_under(vector) is not None:
        return vector
    if vector.ndim != 1:
        raise ValueError(f"a state is one flat vector; this array has shape {vector.shape}")
    return np.frombuffer(vector.astype(_FLOAT32, copy=False).tobytes(), _FLOAT32)


def _bytes_under(vector: np.ndarray) -> bytes | None:
    """The ``bytes`` object that ``vector`` shows, all of it and in order, if there is one."""
    data: object = vector.base
    if not isinstance(data, bytes) or vector.dtype != _FLOAT32 or not vector.flags.c_contiguous:
        return None
    return data if vector.shape == (len(data) // 4,) and len(data) % 4 == 0 else None


def _state_record(vector: np.ndarray) -> ArrayRecord:
    vector = freeze(vector)
    data = _bytes_under(vector)
    return quick_record(ArrayRecord, {"vector": Array("float32", vector.shape, VECTOR_STYPE, data or b"")})


def _arrays_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    made = {}
    for name, array in arrays.items():
        if array.dtype.name not in _KINDS or array.ndim != 1:
            raise TypeError(f"array {name} must be 1-d of {', '.join(_KINDS)}, not {array.dtype} {array.shape}")
        data = array.astype(_KINDS[array.dtype.name], copy=False).tobytes()
        made[name] = Array(array.dtype.name, array.shape, f"shoal.{array.dtype.name}", data)
    return quick_record(ArrayRecord, made)


@dataclass(frozen=True, eq=False)
class _Request:
    """A state for a client, and which job it is for."""

    kind: ClassVar[str]
    client: int
    round: int
    version: int
    state: np.ndarray  # (d,)
    layout: str
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def to_record(self) -> RecordDict:
        """The message's content; it shares the bytes of a frozen ``state`` (see `freeze`) and copies any other."""
        header = _header(self.kind, self.client, self.round, self.version, self.extra, layout=self.layout)
        records = {"state": _state_record(self.state), "header": header, "metrics": MetricRecord()}
        return quick_record(RecordDict, records | _further(self.arrays))

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        """Decode without copying the vector. Raises `MalformedMessage`."""
        header, metrics = _open(record, cls.kind, state=True)
        _take(metrics, {})
        layout = _text(header, "layout")
        return cls(**_job(header), state=_vector(record), layout=layout, extra=_extra(header), arrays=_arrays(record))


Request = _Request  # any of those below


class TrainRequest(_Request):
    """Train from ``state`` and send back the change."""

    kind = "train"


class StatisticRequest(_Request):
    """Send a statistic of some of the client's examples, which an adapter's initialisation needs (`fl.initialise`)."""

    kind = "statistic"


class SecureRequest(_Request):
    """A stage of secure aggregation beside training; ``extra.stage`` names it (`fl.secure`)."""

    kind = "secure"


class GradientRequest(_Request):
    """Send coded sums of chunks' gradients (`fl.coding.workers`)."""

    kind = "gradient"


class PeerRequest(_Request):
    """What a schedule without a server asks of a peer beside training (`fl.schedules.base.PeerPart`)."""

    kind = "peer"


class EvaluateRequest(_Request):
    """Evaluate ``state`` on the client's own test set."""

    kind = "evaluate"


@dataclass(frozen=True, eq=False)
class TrainReply:
    """What a client learned: ``update`` = its new state minus the state it started from, and what that took.

    ``examples`` is the aggregation weight (its training examples), ``steps`` optimiser steps, ``tokens`` tokens
    that were not padding, ``loss`` the mean training loss (None: the client keeps it to itself).
    """

    client: int
    round: int
    version: int
    layout: str
    update: np.ndarray  # (d,)
    examples: int
    steps: int
    tokens: int
    loss: float | None
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def to_record(self) -> RecordDict:
        """The message's content; copies ``update`` once (not at all when frozen)."""
        counts = {name: int(getattr(self, name)) for name in ("examples", "steps", "tokens")}
        loss = {} if self.loss is None else {"loss": float(self.loss)}
        metrics = quick_record(MetricRecord, counts | loss)
        header = _header("train-reply", self.client, self.round, self.version, self.extra, layout=self.layout)
        records = {"state": _state_record(self.update), "header": header, "metrics": metrics}
        return quick_record(RecordDict, records | _further(self.arrays))

    @classmethod
    def from_record(cls, record: RecordDict) -> TrainReply:
        """Decode without copying the vector. Raises `MalformedMessage`; ranges are `fl.validation`'s business."""
        header, metrics = _open(record, "train-reply", state=True)
        wanted: dict[str, type] = {"examples": int, "steps": int, "tokens": int, "loss": float}
        if "loss" not in metrics:
            del wanted["loss"]
        numbers = {"loss": None, **_take(metrics, wanted)}
        layout = _text(header, "layout")
        job, update = _job(header), _vector(record)
        return cls(**job, layout=layout, update=update, **numbers, extra=_extra(header), arrays=_arrays(record))


@dataclass(frozen=True, eq=False)
class EvaluateReply:
    """How a state does on a client's own test set: the mean ``loss`` over ``examples``, and sums in ``metrics``."""

    client: int
    round: int
    version: int
    examples: int
    loss: float
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def to_record(self) -> RecordDict:
        """The message's content: a header and the metrics, no state."""
        if clash := {"examples", "loss"} & self.metrics.keys():
            raise ValueError(f"metrics must not repeat the fields of the reply: {', '.join(sorted(clash))}")
        metrics: dict[str, Metric] = {"examples": int(self.examples), "loss": float(self.loss), **self.metrics}
        header = _header("evaluate-reply", self.client, self.round, self.version, {})
        return RecordDict({"header": header, "metrics": MetricRecord(metrics)})

    @classmethod
    def from_record(cls, record: RecordDict) -> EvaluateReply:
        """Decode. Raises `MalformedMessage`."""
        header, metrics = _open(record, "evaluate-reply", state=False)
        if _extra(header, {"kind", "client", "round", "version"}):
            raise MalformedMessage("schema", "an evaluation carries no extra values")
        numbers = _take(metrics, {"examples": int, "loss": float}, exactly=False)
        rest = {name: value for name, value in metrics.items() if name not in numbers}
        return cls(**_job(header), **numbers, metrics=rest)


def _header(kind: str, client: int, round: int, version: int, extra: Mapping[str, Scalar], **more: str) -> ConfigRecord:
    header: dict[str, Any] = {"kind": kind, "client": int(client), "round": int(round), "version": int(version), **more}
    for name, value in extra.items():
        if not isinstance(value, int | float | str):
            raise TypeError(f"extra value {name} must be a number, text, true or false, not {value!r:.40}")
        header[_EXTRA + name] = value
    return quick_record(ConfigRecord, header)


def _open(record: RecordDict, kind: str, *, state: bool) -> tuple[ConfigRecord, MetricRecord]:
    names = {"state", "header", "metrics"} if state else {"header", "metrics"}
    if not isinstance(record, RecordDict) or set(record) - ({"arrays"} if state else set()) != names:
        raise MalformedMessage("schema", f"the content must hold exactly {', '.join(sorted(names))}")
    header, metrics = record["header"], record["metrics"]
    if not isinstance(header, ConfigRecord) or not isinstance(metrics, MetricRecord):
        raise MalformedMessage("schema", "header must be a ConfigRecord and metrics a MetricRecord")
    if header.get("kind") != kind:
        raise MalformedMessage("schema", f"expected a message of kind {kind!r}, got {header.get('kind')!r:.40}")
    return header, metrics


def _vector(record: RecordDict) -> np.ndarray:
    arrays = record["state"]
    if not isinstance(arrays, ArrayRecord) or list(arrays) != ["vector"]:
        raise MalformedMessage("schema", "state must be an ArrayRecord with one array named vector")
    array = arrays["vector"]
    if (array.stype, array.dtype) != (VECTOR_STYPE, "float32") or not isinstance(array.data, bytes):
        text = f"the vector must be float32 bytes of type {VECTOR_STYPE}, not {array.dtype!r:.40} {array.stype!r:.40}"
        raise MalformedMessage("schema", text)
    size = len(array.data) // 4
    if tuple(array.shape) != (size,) or len(array.data) % 4:
        raise MalformedMessage("shape", f"{len(array.data)} bytes are not float32 of shape {array.shape!r:.80}")
    return np.frombuffer(array.data, _FLOAT32)


def _further(arrays: Mapping[str, np.ndarray]) -> dict[str, ArrayRecord]:
    return {"arrays": _arrays_record(arrays)} if arrays else {}


def _arrays(record: RecordDict) -> dict[str, np.ndarray]:
    if "arrays" not in record:
        return {}
    arrays = record["arrays"]
    if not isinstance(arrays, ArrayRecord):
        raise MalformedMessage("schema", "arrays must be an ArrayRecord")
    found = {}
    for name, array in arrays.items():
        kind = _KINDS.get(array.dtype)
        if kind is None or array.stype != f"shoal.{array.dtype}" or not isinstance(array.data, bytes):
            text = f"array {name!r:.40} must be raw bytes of {', '.join(_KINDS)}, not {array.dtype!r:.40}"
            raise MalformedMessage("schema", text)
        size, rest = divmod(len(array.data), kind.itemsize)
        if tuple(array.shape) != (size,) or rest:
            raise MalformedMessage("shape", f"{len(array.data)} bytes are not {kind} of shape {array.shape!r:.80}")
        found[str(name)] = np.frombuffer(array.data, kind)
    return found


def _job(header: ConfigRecord) -> dict[str, Any]:
    values = {name: header.get(name) for name in ("client", "round", "version")}
    for name, value in values.items():
        if type(value) is not int or value not in _INT64:
            raise MalformedMessage("schema", f"header.{name} must be a whole number, not {value!r:.40}")
    return values


def _text(header: ConfigRecord, name: str) -> str:
    value = header.get(name)
    if not isinstance(value, str):
        raise MalformedMessage("schema", f"header.{name} must be text, not {value!r:.40}")
    return value


_HEADER = {"kind", "client", "round", "version", "layout"}


def _extra(header: ConfigRecord, known: set[str] = _HEADER) -> dict[str, Scalar]:
    extra: dict[str, Scalar] = {}
    for name, value in header.items():
        if name in known:
            continue
        if not name.startswith(_EXTRA) or not isinstance(value, int | float | str):
            raise MalformedMessage("schema", f"the header must not hold {name!r:.40}")
        extra[name.removeprefix(_EXTRA)] = value
    return extra


def _take(metrics: MetricRecord, wanted: Mapping[str, type], exactly: bool = True) -> dict[str, Any]:
    """The ``wanted`` numbers of ``metrics``; a whole number is accepted where a float is wanted."""
    if not wanted.keys() <= set(metrics) or (exactly and len(metrics) != len(wanted)):
        names = ", ".join(wanted) or "nothing"
        raise MalformedMessage("schema", f"metrics must hold {names}, not {list(metrics)!r:.80}")
    numbers: dict[str, Any] = {}
    for name, kind in wanted.items():
        value = metrics[name]
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or not isinstance(value, int | float) or (kind is int and value not in _INT64):
            raise MalformedMessage("schema", f"metrics.{name} must be {kind.__name__}, not {value!r:.40}")
        numbers[name] = kind(value)
    return numbers


def payload_bytes(record: RecordDict) -> int:
    """The size of ``record`` serialised as Flower's protobuf message, exactly, by arithmetic: nothing is built.

    This is what one client sends or receives; that a cohort grid packs messages does not change it.
    """
    total = 0
    for name, value in record.items():
        if isinstance(value, ArrayRecord):
            sizes = [_text_field(key) + _field(_array_bytes(array)) for key, array in value.items()]
        else:
            sizes = [_text_field(key) + _field(_value_bytes(number)) for key, number in value.items()]
        total += _field(_text_field(name) + _field(sum(map(_field, sizes))))
    return total


def _varint(value: int) -> int:
    return max(1, (value.bit_length() + 6) // 7)


def _field(size: int) -> int:
    """A tag of one byte (field numbers below 16), a length and ``size`` bytes."""
    return 1 + _varint(size) + size


def _text_field(text: str) -> int:
    return _field(len(_utf8(text))) if text else 0  # proto3 leaves out what is empty


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # what can't be sent is still counted: validation refuses it


def _array_bytes(array: Array) -> int:
    shape = sum(_varint(n % 2**64) for n in array.shape)
    size = _text_field(array.dtype) + _text_field(array.stype) + (_field(shape) if array.shape else 0)
    return size + (_field(len(array.data)) if array.data else 0)


def _value_bytes(value: Any) -> int:
    if isinstance(value, bool):
        return 2
    if isinstance(value, int):
        return 1 + _varint(2 * value if value >= 0 else -2 * value - 1)  # zigzag; a uint64 from 2**63 on has as many
    if isinstance(value, float):
        return 9
    if isinstance(value, str | bytes):
        return _field(len(_utf8(value) if isinstance(value, str) else value))
    return config_record_to_proto(ConfigRecord({"": value})).items[0].value.ByteSize()  # a list
