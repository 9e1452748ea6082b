"""A TCP proxy on loopback that keeps all bytes that one side sends."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self


class Recorder:
    """Listens on ``port`` of 127.0.0.1 and passes everything on to ``target`` there and back.

    ``sent`` has a stream of bytes for each connection: what the side that connected has sent.
    """

    def __init__(self, target: int):
        self.target = target
        self.sent: list[bytearray] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self.target))
                self._open += [here, there]
                stream = bytearray()
                self.sent.append(stream)
                for words in ((here, there, stream), (there, here, None)):
                    threading.Thread(target=_pass, args=words, daemon=True).start()


def _pass(source: socket.socket, target: socket.socket, kept: bytearray | None) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(1 << 16):
            if kept is not None:
                kept += chunk
            target.sendall(chunk)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
