"""The ``engine=`` group: where the clients' work runs."""

from __future__ import annotations

from dataclasses import dataclass

from clients.tuning import Resources
from fl.config import setting


@dataclass(frozen=True)
class InProcess(Resources):
    """All clients in this process (and its workers), with Flower messages between them and the server.

    ``message_copy``: what a message costs between server and clients: ``records`` gives each receiver its own records
    over shared bytes, ``wire`` serialises as on a network.
    """

    message_copy: str = setting("records", choices=["records", "wire", "none"], help="how messages are handed over")
