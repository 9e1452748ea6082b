"""Peers on several hosts: each node listens for the others, and sends to them over connections of its own.

Connections are TLS 1.3, with certificates at both ends (`fl.transport.identity`). A node that connects may speak for
those clients that the address book gives to its name; and a node that is connected to must have the name that the book
has. Plain TCP is for tests on one machine: it listens on the loopback address and connects to no other.

A frame (`fl.transport.frames`) of a round that this node has not begun stays in its connection, unread, until it does:
so nothing is kept that has not been checked, and who is ahead waits. Its header is checked then; one that does not fit
ends the connection, before its numbers are read, and is logged and counted.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterable

import numpy as np

from fl.errors import ShoalError
from fl.transport.base import Address, Exchange, Heard
from fl.transport.frames import HEADER, BadFrame, Head, pack, read_head, read_vector, size
from fl.transport.identity import Identity, name_of, names
from fl.transport.inbox import LATER, NOW, Inbox
from fl.transport.wire import CONNECT_S, Wire, shut, tune

log = logging.getLogger("shoal.peers")
STALL_S = 60.0  # for the numbers of a frame whose header has come
MOST = 512  # connections that come in at a time
TURN_S = 0.5
WELCOME = b"+"  # the one byte that goes back: whoever connected has been let in


class Sockets:
    """A `fl.transport.base.PeerTransport` for one node process, which listens on ``host`` and ``port`` (0: a free one).

    ``identity`` None: plain TCP, if ``insecure`` says so, on the loopback address. ``hold_s`` is how long a frame of a
    later round may wait. Raises `ShoalError` where it can't listen so.
    """

    def __init__(
        self, host: str, port: int, identity: Identity | None, *, insecure: bool = False, hold_s: float = 3600.0
    ):
        if identity is None and not (insecure and is_loopback(host)):
            raise ShoalError(
                f"Peers listen on {host} with TLS only: without it everybody on the way reads and changes models. "
                "Give the node's keys (`shoal keys` makes them); plain TCP is for 127.0.0.1."
            )
        self.identity, self._hold_s = identity, hold_s
        self._server: ssl.SSLContext | None = None
        self._client: ssl.SSLContext | None = None
        if identity is not None:
            self._server, self._client = identity.contexts()
        self._inbox, self._lock = Inbox(), threading.Lock()
        self._exchange: Exchange | None = None
        self._wires: dict[Address, Wire] = {}
        self._incoming: set[socket.socket] = set()
        self._closed = False
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ShoalError(f"Peers can't listen on {host}:{port}: {error}. Choose another address.") from error
        self._listener.settimeout(TURN_S)
        self.host, self.port = host, int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._listen, name="peers", daemon=True)
        self._thread.start()

    @classmethod
    def at(cls, listen: str, identity: Identity | None) -> Sockets:
        """What listens at ``listen`` (HOST:PORT), without an identity by plain TCP. Raises `ShoalError`."""
        host, port, _ = Address.of(listen)
        return cls(host, port, identity, insecure=identity is None)

    @property
    def address(self) -> Address:
        """Where others reach this node."""
        return Address(self.host, self.port, "" if self.identity is None else name_of(self.identity.certificate))

    @property
    def counts(self) -> Counter[str]:
        return self._inbox.counts

    def begin(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._inbox.begin(exchange)

    def send(self, round: int, src: int, dst: int, vector: np.ndarray | None) -> int:
        now = self._exchange
        assert now is not None
        if dst in now.mine:
            self._inbox.put(now.run, round, src, dst, vector)
            return size(vector)
        address = now.book.get(dst)
        if address is None:
            raise ShoalError(f"client {src} has a message for client {dst}, whose address is not known")
        if address not in self._wires:
            self._wires[address] = Wire(address, self._reach, self._inbox.count)
        frame = pack(now.run, round, src, dst, vector)
        self._wires[address].put(frame, now.deadline)
        return len(frame)

    def receive(self, round: int, dst: int, srcs: Iterable[int], deadline: float) -> Heard:
        return self._inbox.receive(round, dst, srcs, deadline)

    def close(self) -> None:
        self._closed = True
        shut(self._listener)
        self._inbox.close()
        for wire in self._wires.values():
            wire.close()
        with self._lock:
            incoming = list(self._incoming)
        for sock in incoming:
            shut(sock)
        self._thread.join(2 * TURN_S)

    # Out

    def _reach(self, address: Address, timeout_s: float) -> socket.socket:
        """A connection to the node at ``address``. Raises `OSError`."""
        if self._client is None and not is_loopback(address.host):
            raise OSError(f"plain TCP goes to this machine only, not to {address.host}")
        sock = socket.create_connection((address.host, address.port), timeout_s)
        try:
            tune(sock)
            if self._client is not None:
                sock = wrapped = self._client.wrap_socket(sock)
                if address.name not in names(wrapped):
                    raise OSError(f"its certificate is that of {', '.join(sorted(names(wrapped))) or 'nobody'}")
            if sock.recv(len(WELCOME)) != WELCOME:
                raise OSError("it has not let this node in")
        except BaseException:
            shut(sock)
            raise
        return sock

    # In

    def _listen(self) -> None:
        while not self._closed:
            try:
                raw, source = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if not self._closed:
                    log.error("peers are not heard any more: %s", error)
                return
            with self._lock:
                full = len(self._incoming) >= MOST
                if not full:
                    self._incoming.add(raw)
            if full:
                self._refuse("connections", f"{source[0]}: there are {MOST} connections already")
                shut(raw)
            else:
                threading.Thread(target=self._serve, args=(raw, str(source[0])), name="peer", daemon=True).start()

    def _serve(self, sock: socket.socket, source: str) -> None:
        """Read one connection until it ends, or says what it must not."""
        speaker = None
        try:
            sock.settimeout(CONNECT_S)
            tune(sock)
            if self._server is not None:
                wrapped = self._server.wrap_socket(sock, server_side=True)
                with self._lock:
                    self._incoming ^= {sock, wrapped}
                sock, speaker = wrapped, names(wrapped)
            sock.sendall(WELCOME)
            while (data := _exactly(sock, HEADER.size, None)) is not None:
                head = read_head(data)
                state = self._check(head, speaker)
                numbers = _exactly(sock, head.bytes, STALL_S) if head.bytes else b""
                if numbers is None:
                    break
                if state == NOW:
                    self._inbox.put(head.run, head.round, head.src, head.dst, read_vector(head, numbers))
                else:
                    self._inbox.count("stale")
        except BadFrame as error:
            self._refuse(error.reason, f"{source}: {error}")
        except ssl.SSLError as error:
            self._refuse("connection", f"{source}: {error}")
        except OSError as error:
            if not self._closed:
                log.info("%s: the connection ended: %s", source, error)
        finally:
            with self._lock:
                self._incoming.discard(sock)
            shut(sock)

    def _check(self, head: Head, speaker: frozenset[str] | None) -> str:
        """Whether the frame is of now or stale, once that is known. Raises `BadFrame` where it is not to be read."""
        state = self._inbox.settled(head.run, head.round, head.dst, self._hold_s)
        now = self._exchange
        if state == LATER or now is None:
            raise BadFrame("unknown", f"run {head.run.hex()}, round {head.round} for {head.dst} has not begun here")
        if head.dtype and (head.dtype, head.length) != (now.dtype, now.length):
            text = f"{head.length} {head.dtype} from {head.src}; {now.length} {now.dtype} are expected"
            raise BadFrame("size", text)
        address = now.book.get(head.src)
        if state == NOW and (address is None or (speaker is not None and address.name not in speaker)):
            whose = "nobody here hears" if address is None else f"{address.name} speaks for"
            raise BadFrame("sender", f"{', '.join(sorted(speaker or ['a node']))} sends for {head.src}, whom {whose}")
        return state

    def _refuse(self, reason: str, text: str) -> None:
        self._inbox.count(f"refused: {reason}")
        log.warning("refused from %s", text)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine's own address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _exactly(sock: socket.socket, number: int, timeout_s: float | None) -> bytes | None:
    """``number`` bytes; None where the connection ends. Raises `OSError` after ``timeout_s`` without any."""
    sock.settimeout(timeout_s)
    data = bytearray(number)
    view, at = memoryview(data), 0
    while at < number:
        got = sock.recv_into(view[at:])
        if not got:
            return None
        at += got
    return bytes(data)
