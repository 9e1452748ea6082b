"""Which replies count: every reply becomes an accepted result or a `Rejection` with one of a fixed list of reasons.

`Validator.check` is total: whatever a client or a node sends, it returns and never raises, so one bad reply can't end
a run, and no aggregation rule ever sees a value that was not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import numpy as np
from flwr.app import Message, RecordDict

from fl.messages import BUDGET, EvaluateReply, MalformedMessage, Request, TrainReply

Reply = TypeVar("Reply", TrainReply, EvaluateReply)
MOST = 2**31 - 1  # examples of an evaluation


class Reason(StrEnum):
    """Why a reply was rejected, in the order in which it is checked."""

    UNEXPECTED = "unexpected"  # nobody asked for it, or it names another client
    DUPLICATE = "duplicate"  # this job was answered already
    LATE = "late"  # after the deadline of its round or job
    STALE = "stale"  # it started from a version that is too old by now
    BUDGET = "budget"  # the client's privacy budget is spent
    ERROR = "error"  # the client raised, or its node is gone
    SCHEMA = "schema"  # not the records, names and types of fl.messages
    VERSION = "version"  # made from another version or for another round
    LAYOUT = "layout"  # tensors of another model or adapter
    SHAPE = "shape"  # not d numbers
    NOT_FINITE = "not_finite"  # NaN or infinite, in the update or the loss
    TOO_LARGE = "too_large"  # norm of the update above the bound
    WEIGHT = "weight"  # examples not in 1..cap
    PROOF = "proof"  # its masked or shared form can't be used: the norm is not proved, say


@dataclass(frozen=True)
class Rejection:
    """A reply that does not count, and why: ``reason`` for counting, ``detail`` for people."""

    reason: Reason
    detail: str


class Validator:
    """Checks replies against what was asked for.

    ``layout`` is the hash of the state's layout, and ``size`` the scalars of an update, or a function from a request to
    them, where clients or rounds train different tensors; ``max_norm`` bounds the Euclidean norm of an update (None: no
    bound); ``max_weight`` (for all, or by client) caps the examples that a client may claim, since an invented 10^9
    would own the mean. ``arrays`` gives, for a request, the named arrays that belong into its reply:
    their types and sizes (-1: any). A job, which is a (client, round), is answered once: its first reply counts,
    good or bad.
    """

    def __init__(
        self,
        layout: str,
        size: int | Callable[[Request], int],
        max_norm: float | None = None,
        max_weight: int | Callable[[int], int] = 2**31 - 1,
        arrays: Callable[[Request], Mapping[str, tuple[str, int]]] = lambda request: {},
    ):
        self._arrays = arrays
        self.layout, self.max_norm, self.max_weight = layout, max_norm, max_weight
        self._size = size
        kinds = ("train", "evaluate", "statistic", "secure", "gradient", "peer")
        self._answered: dict[str, set[tuple[int, int]]] = {kind: set() for kind in kinds}

    def check(self, reply: Message, request: Request | None, *, late: bool = False) -> TrainReply | Rejection:
        """The decoded ``reply`` to ``request`` (None: nothing was asked of this client), or why it is rejected."""
        size = 0 if request is None else self.size(request)
        return self._check(reply, request, late, TrainReply.from_record, lambda r: self._faults(r, size, request))

    def size(self, request: Request) -> int:
        """Scalars of the update that answers ``request``."""
        return self._size(request) if callable(self._size) else self._size

    def check_evaluation(
        self, reply: Message, request: Request | None, *, late: bool = False
    ) -> EvaluateReply | Rejection:
        """The same for a client's evaluation: ``examples`` in 0..cap, and every number finite."""
        return self._check(reply, request, late, EvaluateReply.from_record, self._evaluation_faults)

    def forget(self, before_round: int) -> None:
        """Drop what is remembered of answered jobs of rounds below ``before_round``; no reply to them can come."""
        for kind, jobs in self._answered.items():
            self._answered[kind] = {job for job in jobs if job[1] >= before_round}

    def clear(self) -> None:
        """Drop all that is remembered of answered jobs, where the caller knows which are still out."""
        for jobs in self._answered.values():
            jobs.clear()

    def _check(
        self,
        reply: Message,
        request: Request | None,
        late: bool,
        decode: Callable[[RecordDict], Reply],
        faults: Callable[[Reply], Rejection | None],
    ) -> Reply | Rejection:
        if request is None:
            return Rejection(Reason.UNEXPECTED, "no work was asked for")
        job = (request.client, request.round)
        answered = self._answered[request.kind]
        if job in answered:
            return Rejection(Reason.DUPLICATE, f"client {request.client} has answered round {request.round} already")
        answered.add(job)
        if late:
            return Rejection(Reason.LATE, "it came after the deadline")
        try:
            if reply.has_error():
                if str(reply.error.reason).startswith(BUDGET):
                    return Rejection(Reason.BUDGET, str(reply.error.reason)[:200])
                return Rejection(Reason.ERROR, f"code {reply.error.code}: {reply.error.reason}")
            decoded = decode(reply.content)
            return _wrong_job(decoded, request) or faults(decoded) or decoded
        except MalformedMessage as error:
            return Rejection(Reason(error.part), str(error))
        except Exception as error:  # the sender decides what is in a message, so anything may break
            return Rejection(Reason.SCHEMA, f"it can't be read ({type(error).__name__}: {error!s:.200})")

    def _faults(self, reply: TrainReply, size: int, request: Request | None) -> Rejection | None:
        if reply.layout != self.layout:
            return Rejection(Reason.LAYOUT, f"layout {reply.layout:.40}, expected {self.layout}")
        if reply.update.shape != (size,):
            return Rejection(Reason.SHAPE, f"{reply.update.size} numbers, expected {size}")
        wanted = self._arrays(request) if request is not None else {}
        if wanted.keys() != reply.arrays.keys():
            return Rejection(Reason.SCHEMA, f"arrays {sorted(reply.arrays)!r:.80}, expected {sorted(wanted)}")
        for name, (kind, length) in wanted.items():
            found = reply.arrays[name]
            if found.dtype.name != kind or length not in (-1, len(found)):
                return Rejection(Reason.SHAPE, f"array {name}: {len(found)} {found.dtype.name}, not {length} {kind}")
        # float64: squares of float32 can't overflow it, so the norm is finite exactly if every number is.
        norm = float(np.sqrt(np.square(reply.update, dtype=np.float64).sum()))
        if not np.isfinite(norm) or not np.isfinite(reply.loss or 0.0):
            return Rejection(Reason.NOT_FINITE, f"update of norm {norm}, loss {reply.loss}")
        if self.max_norm is not None and norm > self.max_norm:
            return Rejection(Reason.TOO_LARGE, f"norm {norm:.6g} is above {self.max_norm:.6g}")
        most = self._most(reply.client)
        if not 1 <= reply.examples <= most:
            return Rejection(Reason.WEIGHT, f"{reply.examples} examples, allowed are 1 to {most}")
        if reply.steps < 0 or reply.tokens < 0:
            return Rejection(Reason.SCHEMA, f"negative counts: {reply.steps} steps, {reply.tokens} tokens")
        return None

    def _evaluation_faults(self, reply: EvaluateReply) -> Rejection | None:
        if not all(np.isfinite(value).all() for value in (reply.loss, *reply.metrics.values())):
            return Rejection(Reason.NOT_FINITE, "a metric is not finite")
        most = MOST if callable(self.max_weight) else self.max_weight
        if not 0 <= reply.examples <= most:
            return Rejection(Reason.WEIGHT, f"{reply.examples} examples, allowed are 0 to {most}")
        return None

    def _most(self, client: int) -> int:
        return self.max_weight(client) if callable(self.max_weight) else self.max_weight


def _wrong_job(reply: TrainReply | EvaluateReply, request: Request) -> Rejection | None:
    if reply.client != request.client:
        return Rejection(Reason.UNEXPECTED, f"client {request.client} answers as client {reply.client}")
    if (reply.round, reply.version) != (request.round, request.version):
        got, wanted = f"{reply.round}/{reply.version}", f"{request.round}/{request.version}"
        return Rejection(Reason.VERSION, f"round/version {got}, expected {wanted}")
    return None
