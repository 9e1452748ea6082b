"""A TCP proxy between a node and the server, which can change one bit of what passes."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

HANDSHAKE = 6_000  # bytes in one direction, at least; no connection's first are touched


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes everything to ``port`` and back.

    After `change` one bit of the next part that passes in that direction is flipped, on a connection that is past its
    TLS handshake.
    """

    def __init__(self, port: int):
        self.target, self.changed = port, {"up": 0, "down": 0}
        self._wanted: set[str] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def change(self, direction: str) -> None:
        """Flip one bit of what goes ``up`` to the server, or ``down`` to the node."""
        with self._lock:
            self._wanted.add(direction)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                node = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.target))
                self._open += [node, server]
                for direction, source, sink in (("up", node, server), ("down", server, node)):
                    threading.Thread(target=self._pass, args=(direction, source, sink), daemon=True).start()

    def _pass(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if passed > HANDSHAKE and len(data) > 100:
                    data = self._flipped(direction, data)
                passed += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _flipped(self, direction: str, data: bytes) -> bytes:
        with self._lock:
            if direction not in self._wanted:
                return data
            self._wanted.remove(direction)
            self.changed[direction] += 1
        changed = bytearray(data)
        changed[len(data) // 2] ^= 1
        return bytes(changed)
