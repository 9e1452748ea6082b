"""How long messages between peers take: a latency for each link, and a queue at each end.

A message of b bytes from i to j that is ready at tick r, with ``b|mbps = ticks(8 b / (mbps 10^6))`` (0: no limit)::

    left     = max(r, i's uplink is free) + b|up_i                  the uplink is then busy until left
    reached  = left + latency_i + latency_j
    arrived  = max(reached, j's downlink is free) + b|down_j        the downlink is then busy until arrived

A peer's messages leave one after the other, in the order of (r, j), and pass their receiver's downlink in the order of
(reached, i): store and forward, first come, first served. So a complete graph is not free: a peer sends its n - 1
messages through one uplink.

Each device's latency and rates (``network=``) are those of its way to the core of the network; ``topology.latency_s``
replaces the sum of both latencies, ``topology.mbps`` the rate of every uplink and downlink.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fl.clock import TICKS_PER_SECOND, ticks

if TYPE_CHECKING:
    from fl.network import Network
    from fl.topology.base import Topology

Message = tuple[int, int, int, int]  # from, to, the tick at which it is ready, bytes


class Links:
    """The links of ``number`` peers in the run with ``seed``. Until when each queue is busy is its state."""

    def __init__(self, topology: Topology, network: Network, seed: int, number: int):
        devices = [network.device(seed, peer, number) for peer in range(number)]
        rates = [(d.up_mbps, d.down_mbps) if topology.mbps is None else (topology.mbps,) * 2 for d in devices]
        # An unlimited rate is infinite: 8 b / inf is 0.
        self._up, self._down = np.array([[np.inf if r is None else r for r in pair] for pair in rates], dtype=float).T
        whole = topology.latency_s
        self._latency = [ticks(d.latency_s) for d in devices] if whole is None else [0] * number
        self._whole = 0 if whole is None else ticks(whole)
        self.up_free = [0] * number
        self.down_free = [0] * number

    def send(self, messages: Sequence[Message]) -> dict[tuple[int, int], int]:
        """The tick at which each message arrives, by (from, to).

        One message a pair in a call, and calls in the order of time: what an earlier one sent has gone before. Raises
        `ValueError` for two messages of a pair.
        """
        if not messages:
            return {}
        ordered = sorted(messages, key=lambda m: (m[2], m[1]))
        sources, targets, _, sizes = np.array(ordered, dtype=np.int64).T
        on_up, on_down = self._ticks(sizes, self._up[sources]), self._ticks(sizes, self._down[targets])
        under_way = []
        for (i, j, ready, _), up, down in zip(ordered, on_up, on_down):
            left = max(ready, self.up_free[i]) + up
            if up:
                self.up_free[i] = left
            under_way.append((left + self._whole + self._latency[i] + self._latency[j], i, j, down))
        arrived: dict[tuple[int, int], int] = {}
        for reached, i, j, down in sorted(under_way):
            if (i, j) in arrived:
                raise ValueError(f"two messages from {i} to {j} in one call")
            arrived[i, j] = reached
            if down:
                arrived[i, j] = self.down_free[j] = max(reached, self.down_free[j]) + down
        return arrived

    @staticmethod
    def _ticks(sizes: np.ndarray, mbps: np.ndarray) -> list[int]:
        """`fl.fleet.transfer` of each size."""
        return np.rint(8 * sizes / (mbps * 1e6) * TICKS_PER_SECOND).astype(np.int64).tolist()

    def state(self) -> dict[str, Any]:
        """Everything that changes, as JSON-able values, for a checkpoint."""
        return {"up_free": list(self.up_free), "down_free": list(self.down_free)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.up_free, self.down_free = list(state["up_free"]), list(state["down_free"])
