"""One node's connection to another: frames leave one after the other, over a connection that is kept and made anew."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable

from fl.transport.base import Address

log = logging.getLogger("shoal.peers")
CONNECT_S = 10.0  # for one attempt
SHORTEST_S, LONGEST_S = 0.05, 1.0  # pauses between attempts
UNHEARD_MS = 20_000  # a connection whose other end acknowledges nothing for so long is given up


Connect = Callable[[Address, float], socket.socket]


class Wire:
    """Sends frames to ``address`` in a thread of its own, each until it has left or its time is over.

    ``connect`` makes a connection within some seconds; what could not be sent is counted as ``unsent``. Frames go one
    way, so whatever can be read from a connection says that it has ended: that is looked at before each frame.
    """

    def __init__(
        self, address: Address, connect: Callable[[Address, float], socket.socket], count: Callable[[str], None]
    ):
        self.address, self._connect, self._count = address, connect, count
        self._queue: deque[tuple[bytes, float]] = deque()
        self._changed = threading.Condition()
        self._closed, self._troubled = False, False
        self._sock: socket.socket | None = None
        self._thread = threading.Thread(target=self._work, name=f"peers to {address.name}", daemon=True)
        self._thread.start()

    def put(self, frame: bytes, deadline: float) -> None:
        """Send ``frame`` by the time ``deadline``."""
        with self._changed:
            self._queue.append((frame, deadline))
            self._changed.notify_all()

    def close(self) -> None:
        """End the connection; what has not left is not sent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        sock = self._sock
        if sock is not None:
            shut(sock)
        self._thread.join(CONNECT_S)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    break
                frame, deadline = self._queue.popleft()
            if not self._sent(frame, deadline):
                self._count("unsent")
        self._drop()

    def _sent(self, frame: bytes, deadline: float) -> bool:
        pause_s = SHORTEST_S
        while not self._closed and (left_s := deadline - time.monotonic()) > 0:
            try:
                if self._sock is None or ended(self._sock):
                    self._drop()
                    self._sock = self._connect(self.address, min(left_s, CONNECT_S))
                self._sock.settimeout(max(SHORTEST_S, deadline - time.monotonic()))
                self._sock.sendall(frame)
                if self._troubled:
                    log.info("%s at %s:%d is reached again", self.address.name, *self.address[:2])
                self._troubled = False
                return True
            except OSError as error:
                self._drop()
                if not self._troubled:
                    log.warning("%s at %s:%d can't be reached: %s", self.address.name, *self.address[:2], error)
                self._troubled = True
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, min(pause_s, left_s))
                pause_s = min(LONGEST_S, 2 * pause_s)
        return False

    def _drop(self) -> None:
        if self._sock is not None:
            shut(self._sock)
            self._sock = None


def ended(sock: socket.socket) -> bool:
    """Whether the other end has closed the connection, which carries frames one way."""
    sock.settimeout(0)
    try:
        sock.recv(1)
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
    return True


def shut(sock: socket.socket) -> None:
    """Close ``sock``, and end what another thread does with it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def tune(sock: socket.socket) -> None:
    """Small frames leave at once, and a host that is gone is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNHEARD_MS)
