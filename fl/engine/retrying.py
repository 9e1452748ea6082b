"""Patience with a SuperLink: requests that are tried again, and a grid that survives its errors.

A SuperLink answers 500 when its database is locked, and nothing at all while it is restarted. `Retry` waits for it,
with pauses that grow from 0.25 s to 5 s. The grid of the server and the resident node use it.

What holds when a request is repeated that may have succeeded before (Flower 1.41):

- **push**: a message's id is the SHA-256 hash of the message without its id, so that the same Message has the same id
  when it is pushed again. The SuperLink keeps one message an id: it is stored once, and delivered to its node once.
  Contents are objects by hash, and only those that are missing are sent again. A second Message made for the same job
  is another one (its time differs); jobs are idempotent at the nodes, keyed by client and round.
- **pull**: a reply is handed out once, when the request for it arrives. If the SuperLink's answer is lost on the way
  that reply is lost: the next pull gives an error reply with code ``MESSAGE_UNAVAILABLE`` or, where the SuperLink was
  stopped in between, nothing until the message's time to live is over. So wait with a deadline. Contents of replies
  are fetched one by one and each is repeated on its own, so that an error there loses nothing.
- What the SuperLink answers itself has ``MESSAGE_UNAVAILABLE`` (also for replies whose contents never come) or
  ``NODE_UNAVAILABLE``, and may come from its own node id: only ``metadata.reply_to_message_id`` tells what it answers.
"""

from __future__ import annotations

import functools
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import Run, RunNotRunningException

from fl.engine.objects import Replies
from fl.errors import RunStopped

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
T = TypeVar("T")
log = logging.getLogger(__name__)


class Retry:
    """Calls that are made again after an HTTP 5xx or a transport error, up to ``patience_s`` seconds each.

    ``away_s`` is the patience with a SuperLink that can't be reached (transport errors, 502 to 504), ``patience_s`` by
    default. ``stop`` ends all waiting. Then, and when patience is over, the call's own error is raised. A 4xx is
    raised at once; 403 as Flower's `RunNotRunningException`, which is what it means. TLS errors before the first
    answer don't heal and are raised too. Any number of threads may call; trouble is logged when it starts and when the
    last call that was in it succeeds.

    Flower's HTTP clients take such an object as their ``retry_invoker``; Flower sets ``max_tries`` as a process ends.
    """

    def __init__(
        self,
        what: str = "the SuperLink",
        patience_s: float = 120.0,
        away_s: float | None = None,
        *,
        stop: threading.Event | None = None,
        log: logging.Logger = log,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.patience_s, self.away_s = what, patience_s, patience_s if away_s is None else away_s
        self.max_tries: int | None = None
        self.reached = False  # the SuperLink has answered once
        self._stop, self._log, self._clock = stop or threading.Event(), log, clock
        self._lock, self._in_trouble, self._since = threading.Lock(), 0, 0.0

    def invoke(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """``call(*args, **kwargs)``, however often it takes."""
        began: float | None = None
        tries, pause = 0, FIRST_PAUSE_S
        try:
            while True:
                try:
                    result = call(*args, **kwargs)
                except (httpx.TransportError, httpx.HTTPStatusError) as error:
                    tries += 1
                    patience = self._patience(error)
                    now = self._clock()
                    if began is None and patience:
                        began = now
                        self._enter(error)
                    out_of_tries = self.max_tries is not None and tries >= self.max_tries
                    if began is None or now - began >= patience or out_of_tries or self._stop.wait(pause):
                        raise
                    pause = min(1.5 * pause, LONGEST_PAUSE_S)
                else:
                    self.reached = True
                    if began is not None:
                        self._leave(good=True)
                        began = None
                    return result
        finally:
            if began is not None:
                self._leave(good=False)

    def _patience(self, error: httpx.TransportError | httpx.HTTPStatusError) -> float:
        """How long to go on trying after ``error``, in seconds; 0 where it makes no sense."""
        if isinstance(error, httpx.HTTPStatusError):
            self.reached, status = True, error.response.status_code
            if status == httpx.codes.FORBIDDEN:
                raise RunNotRunningException from error
            if status < 500:
                return 0.0
            return self.away_s if status in (502, 503, 504) else self.patience_s
        return 0.0 if not self.reached and tls_error(error) else self.away_s

    def _enter(self, error: Exception) -> None:
        with self._lock:
            self._in_trouble += 1
            if self._in_trouble == 1:
                self._since = self._clock()
                self._log.warning("%s gives an error (%s); trying again", self.what, described(error))

    def _leave(self, good: bool) -> None:
        with self._lock:
            self._in_trouble -= 1
            if good and not self._in_trouble:
                self._log.warning("%s answers again after %.1f s", self.what, self._clock() - self._since)


def tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """The TLS error behind ``error``, if a wrong certificate or protocol is its cause (not a connection that broke)."""
    while error is not None:
        broken = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
        if isinstance(error, ssl.SSLError) and not isinstance(error, broken):
            return error
        error = error.__cause__ or error.__context__
    return None


def described(error: Exception) -> str:
    """``error`` in a few words: an HTTP status, or the type and text."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code} from {error.request.url.path}"
    return f"{type(error).__name__}: {error!s:.200}".rstrip(": ")


def push_until_stored(push: Callable[[], T], tries: int = 5, pause_s: float = 0.2) -> T:
    """``push()``, again while the SuperLink says that it did not store an object, at most ``tries`` times.

    It says so when its database is locked, when the upload took too long, and when an object comes twice because the
    answer to the first was lost. Pushing the whole message anew settles all three: it asks only for what is missing.
    """
    for left in reversed(range(tries)):
        try:
            return push()
        except ObjectPushError:
            if not left:
                raise
            time.sleep(pause_s)
    raise ValueError(f"tries must be >= 1, not {tries}")


class RetryGrid(Grid):
    """``grid`` with patience: server and transport errors end a run only after ``patience_s`` seconds of them.

    Flower's HttpGrid gets a `Retry` for its single requests, in place of its own, which gives up at once on a 500 and
    never on a SuperLink that is away, and `Replies` in place of its way to pull. Any other grid's calls are repeated as
    a whole. Raises `RunStopped` when patience is over, and lets Flower's `RunNotRunningException` through when somebody
    stopped the run.
    """

    def __init__(self, grid: Grid, patience_s: float = 120.0, *, retry: Retry | None = None):
        self.grid = grid
        self.retry = retry or Retry(patience_s=patience_s)
        self._by_request = hasattr(grid, "_retry_invoker")
        self._replies: Replies | None = None
        if self._by_request:
            vars(grid)["_retry_invoker"] = grid._runtime_client._retry_invoker = self.retry  # type: ignore[attr-defined]
            self._replies = Replies(grid)

    @property
    def run(self) -> Run:
        return self.grid.run

    def set_run(self, run: Run) -> None:
        self.grid.set_run(run)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self._patiently(self.grid.get_node_ids))

    def get_nodes(self) -> list[NodeInfo]:
        return list(self._patiently(self.grid.get_nodes))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send ``messages``; returns their ids, empty for those that the SuperLink refused."""
        messages = list(messages)
        if not messages:
            return []
        push = functools.partial(self._patiently, self.grid.push_messages, messages)
        try:
            return list(push_until_stored(push))
        except ObjectPushError as error:
            raise self._stopped(error) from error

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to ``message_ids`` that are here; `metadata.reply_to_message_id` tells what each answers."""
        pull = self.grid.pull_messages if self._replies is None else self._replies.pull
        return list(self._patiently(pull, list(message_ids)))

    def close(self) -> None:
        """Give up what is on its way; the grid below stays open, for its owner."""
        if self._replies is not None:
            self._replies.close()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None, poll_s: float = 0.1
    ) -> list[Message]:
        """Push, and pull every ``poll_s`` seconds until all have answered or ``timeout`` seconds are over."""
        waiting = {message_id for message_id in self.push_messages(messages) if message_id}
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting:
            got = self.pull_messages(waiting)
            replies += got
            waiting.difference_update(reply.metadata.reply_to_message_id for reply in got)
            if deadline is not None and time.monotonic() >= deadline:
                break
            if waiting:
                time.sleep(poll_s)
        return replies

    def _patiently(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return call(*args) if self._by_request else self.retry.invoke(call, *args)
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            raise self._stopped(error) from error

    def _stopped(self, error: Exception) -> RunStopped:
        what, again = self.retry.what, "go on with `shoal run --resume`"
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
            return RunStopped(f"{what} refuses a request ({described(error)}). Look at its log, and {again}.")
        trouble = f"{what} still gives an error after {self.retry.patience_s:g} s ({described(error)})"
        return RunStopped(f"{trouble}. Restart it with the same --database, and {again}.")
