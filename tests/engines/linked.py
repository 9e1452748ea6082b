"""The whole path of a run on hosts in one process: server, directory, messages as on a wire, and sessions at nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.common.constant import ErrorCode

from fl.compose import compose
from fl.engine.carried import carry
from fl.engine.in_process import FIRST_NODE, InProcessGrid
from fl.engine.session import Place, Session
from fl.experiment import Settings
from fl.records import RunFolder
from fl.run import Outcome, go
from tests.helpers import ENCODER

HOSTS = ("engine=superlink", "engine.insecure=true", "engine.wait_s=0.5", "network.rejoin_s=0", *ENCODER)


class Hosts:
    """Nodes in this process, each with a session and a folder of its own; ``clients`` are those of each node.

    ``between`` is given every message with its node's number before the node is; what it returns is the reply.
    """

    def __init__(self, folder: Path, *clients: str | tuple[int, ...], **place: object):
        self.folder, self.clients, self.place = folder, clients, place
        self.sessions: dict[int, Session] = {}
        self.apps: dict[int, Callable] = {}
        self.away: set[int] = set()
        self.between: Callable[[int, Message, Callable], Message] = lambda node, message, answer: answer(message)
        for node in range(len(clients)):
            self.start(node)

    def start(self, node: int) -> None:
        """Start a node, anew where it ran before: all that it remembers is then on disk."""
        found = self.clients[node]
        place = Place(self.folder / f"node-{node}", tuple(found), **self.place)  # type: ignore[arg-type]
        self.sessions[node] = Session(place)
        self.apps[node] = self.sessions[node].app()

    def __call__(self, message: Message, context: Context) -> Message:
        node = context.node_id - FIRST_NODE
        return self.between(node, message, lambda m: self.apps[node](m, context))

    def run(self, folder: Path, *words: str, resume: bool = False) -> Outcome:
        """A run with these hosts."""
        words = (*HOSTS, *words)
        resolved = compose(words)[0]
        hosts = self

        class Grid(InProcessGrid):
            def get_node_ids(self) -> list[int]:
                return [n for n in super().get_node_ids() if n - FIRST_NODE not in hosts.away]

        grid = Grid(self, len(self.clients), copy="wire", run_config=carry(resolved, str(folder), words, resume))
        record = RunFolder(folder, resume=resume)
        return go(
            Settings.of(resolved), resolved, None if resume else list(words), record, resume, quiet=True, grid=grid
        )


GONE = ErrorCode.NODE_UNAVAILABLE
