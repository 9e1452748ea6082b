"""A resident node: takes work from a SuperLink into this process, so that model, data and tokens stay loaded.

Flower's SuperNode starts a process for each message. This one keeps one ClientApp and calls it: receive, check,
``app(message, context)``, push the reply, one message at a time. It runs only code that is installed here: the app's
archive that travels with a run is never fetched. What it relies on in Flower: see `fl.engine.node_link`.

Delivery: Flower hands a message out once, and the SuperLink keeps one reply for it. A node that dies with a message in
its hands loses it; the SuperLink reports it about a minute later.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.run import RunNotRunningException

from fl.engine.node_link import NodeLink
from fl.engine.objects import MAX_MESSAGE_BYTES, RefusedMessage
from fl.engine.retrying import described
from fl.errors import ShoalError

ERROR_TEXT = 500  # characters of an error's text that leave this node, at most
log = logging.getLogger(__name__)


class Pace:
    """Seconds between two polls: ``nodes / 50``, at least 0.05, after work; half as long again after each empty poll.

    A SuperLink answers some 125 to 250 polls a second, so that many nodes have to ask less often. It goes up to
    ``idle_s``. A function of the calls alone, without a clock; any thread may call.
    """

    def __init__(self, idle_s: float = 3.0):
        self.idle_s = idle_s
        self._lock, self._busy_s, self._last_s = threading.Lock(), 0.05, 0.05

    def nodes(self, count: int) -> None:
        """There are ``count`` nodes at this SuperLink."""
        with self._lock:
            self._busy_s = max(0.05, count / 50)

    def next(self, worked: bool) -> float:
        """How long to wait, given whether the last poll brought work."""
        with self._lock:
            longer = min(1.5 * self._last_s, self.idle_s)
            self._last_s = self._busy_s if worked else max(longer, self._busy_s)
            return self._last_s


def until_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set; the second one raises KeyboardInterrupt. Call it in the main thread."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop


def serve_node(
    superlink: str,
    app: ClientApp,
    *,
    insecure: bool,
    root_certificates: bytes | None = None,
    key_file: Path | None = None,
    node_config: Mapping[str, bool | int | float | str] | None = None,
    stop: threading.Event,
    pace: Pace | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    log: logging.Logger = log,
) -> None:
    """Serve ``app`` as a node of the SuperLink at ``superlink`` (HOST:PORT) until ``stop`` is set, then leave.

    Waits for a SuperLink that is away, now and later; joins again where it has forgotten this node; pushes replies made
    meanwhile when it is back. ``root_certificates`` is the CA in PEM, ``key_file`` an OpenSSH private key that the
    SuperLink knows; without one the node registers itself, which works where the SuperLink does not ask for keys.
    ``app`` gets a context with ``node_config`` and the run's settings; its ``state`` lives as long as the run, here.
    What raises in ``app`` becomes an error reply: type and text of a `ShoalError`, only the type of anything else,
    since its text could hold data; it is logged here. Raises `ShoalError` where joining can't succeed.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for each request
    pace = pace or Pace()
    link = NodeLink(
        superlink, insecure=insecure, root_certificates=root_certificates, key_file=key_file, stop=stop,
        max_message_bytes=max_message_bytes, log=log,
    )  # fmt: skip
    with link:
        desk = Desk(link, app, dict(node_config or {}), log)
        while not stop.is_set():
            worked = False
            try:
                worked = desk.serve_one()
            except httpx.HTTPStatusError as error:
                if error.response.status_code == httpx.codes.UNAUTHORIZED:
                    log.warning("%s does not know node %d any more; joining again", superlink, link.node_id)
                    desk.forget()
                    link.join()
                else:
                    log.error("%s: %s", superlink, described(error))
            except httpx.TransportError as error:
                if not stop.is_set():
                    log.error("%s: %s", superlink, described(error))
            except RunNotRunningException:
                log.info("a run was over before it was answered")
            except Exception:  # nothing that arrives may end the node
                log.exception("a message was lost")
            stop.wait(pace.next(worked))


class Desk:
    """One message at a time: from the link to the app and back, with a context for each run."""

    def __init__(self, link: NodeLink, app: ClientApp, node_config: dict, log: logging.Logger):
        self.link, self.app, self.node_config, self.log = link, app, node_config, log
        self._contexts: dict[int, Context] = {}

    def forget(self) -> None:
        """Drop the contexts of all runs."""
        self._contexts.clear()

    def serve_one(self) -> bool:
        """Answer the next message; False if there is none. Raises what the link raises."""
        try:
            pulled = self.link.pull()
        except RefusedMessage as refused:
            self.log.error("a message was refused: %s", refused)
            return True
        if pulled is None:
            return False
        head, tree = pulled
        began = time.monotonic()
        try:
            reply = self._reply(head, tree)
            took, said = time.monotonic() - began, "an error" if reply.has_error() else "done"
            self.log.info("%s, round %s: %s in %.2f s", head.metadata.message_type, head.metadata.group_id, said, took)
            try:
                self.link.push(reply, time.monotonic() - began)
            except (ObjectPushError, httpx.HTTPStatusError):
                raise
            except Exception as error:  # what the app made can't be sent
                self.link.push(self._failed(head, error))
        except RunNotRunningException:
            self._contexts.pop(head.metadata.run_id, None)
            raise
        return True

    def _reply(self, head: Message, tree: ObjectTree) -> Message:
        try:
            message = self.link.fetch(head, tree)
            context = self._context(head.metadata.run_id)
        except httpx.HTTPError:
            raise
        except Exception as refused:  # the sender decides what is in it, so anything may break
            known = isinstance(refused, RefusedMessage | ObjectPullError)
            text = str(refused) if known else type(refused).__name__
            self.log.error("message %.8s was refused: %s", head.metadata.message_id, text, exc_info=not known)
            return Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, f"refused: {text}"[:ERROR_TEXT]), reply_to=head)
        try:
            self._check_type(head.metadata.message_type)
            reply = self.app(message, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the app returned a {type(reply).__name__}, not a message")
            return reply
        except Exception as error:
            return self._failed(head, error)

    def _failed(self, head: Message, error: Exception) -> Message:
        name = type(error).__name__
        if isinstance(error, ShoalError):
            self.log.error("%s: %s", head.metadata.message_type, error)
            text = f"{name}: {error}"
        else:
            self.log.error("%s failed", head.metadata.message_type, exc_info=error)
            text = f"{name} (the node's log says more)"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, text[:ERROR_TEXT]), reply_to=head)

    def _check_type(self, kind: str) -> None:
        known = getattr(self.app, "_registered_funcs", None)
        if known and (kind if "." in kind else f"{kind}.default") not in known:
            has = ", ".join(name.removesuffix(".default") for name in sorted(known))
            raise ShoalError(f"this node takes no {kind!r} messages; it takes {has}.")

    def _context(self, run_id: int) -> Context:
        """The context of a run. Those of runs that are over are dropped when a new one begins."""
        if run_id not in self._contexts:
            settings = self.link.run_config(run_id)
            for old in list(self._contexts):
                try:
                    self.link.run_config(old)
                except RunNotRunningException:
                    del self._contexts[old]
            self._contexts[run_id] = Context(
                run_id=run_id, node_id=self.link.node_id, node_config=dict(self.node_config), state=RecordDict(),
                run_config=settings,
            )  # fmt: skip
        return self._contexts[run_id]
