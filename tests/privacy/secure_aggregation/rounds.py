"""A round of secure aggregation played by all its parties, with every byte that the server receives kept."""

from dataclasses import dataclass, field

import numpy as np

from fl.keys import generator, key_bytes
from privacy.secure_aggregation.graph import Topology
from privacy.secure_aggregation.protocol import Coordinator, Participant

STAGES = ("advertise", "share", "mask", "unmask")


@dataclass
class Round:
    """Clients with ``ids`` and random vectors; ``lost`` names, for each stage, who drops out before it is heard."""

    topology: Topology
    ids: list[int]
    length: int
    dtype: type = np.uint32
    seed: int = 0
    context: str = "run/1"
    lost: dict[str, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draws = generator(self.seed, "vectors")
        top = np.iinfo(self.dtype).max
        self.vectors = {i: draws.integers(0, top, self.length, self.dtype, endpoint=True) for i in self.ids}
        self.participants = {i: self.participant(i) for i in self.ids}
        self.coordinator = Coordinator(
            self.topology, self.context, self.length, self.dtype, generator(self.seed, "graph", self.context)
        )
        self.received: dict[str, dict[int, bytes]] = {}
        self.sent: dict[str, dict[int, bytes]] = {}

    def participant(self, client: int, state=None) -> Participant:
        secret = key_bytes(self.seed, "secagg", client, self.context)
        return Participant(self.topology, client, self.context, secret, state)

    def hear(self, stage: str, messages: dict[int, bytes]) -> dict[int, bytes]:
        """The messages but those of clients that dropped out at this stage or before; what the server receives."""
        gone = set().union(*(self.lost.get(s, set()) for s in STAGES[: STAGES.index(stage) + 1]))
        self.received[stage] = {i: m for i, m in messages.items() if i not in gone}
        return self.received[stage]

    def until_masked(self) -> None:
        c, p = self.coordinator, self.participants
        self.sent["share"] = c.rosters(self.hear("advertise", {i: p[i].advertise() for i in self.ids}))
        self.sent["mask"] = c.inboxes(self.hear("share", {i: p[i].share(m) for i, m in self.sent["share"].items()}))
        masked = {i: p[i].mask(self.vectors[i], m) for i, m in self.sent["mask"].items()}
        self.all_masked = masked
        for client, message in self.hear("mask", masked).items():
            c.add(client, message)

    def finish(self) -> np.ndarray:
        self.sent["unmask"] = self.coordinator.requests()
        answers = {i: self.participants[i].unmask(m) for i, m in self.sent["unmask"].items()}
        return self.coordinator.total(self.hear("unmask", answers))

    def run(self) -> np.ndarray:
        self.until_masked()
        return self.finish()

    def plain_sum(self, clients) -> np.ndarray:
        total = np.zeros(self.length, self.dtype)
        for client in clients:
            total += self.vectors[client]
        return total
