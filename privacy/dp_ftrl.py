"""DP-FTRL: client-level privacy by noise on prefix sums, without an assumption on sampling (Kairouz et al. 2021).

arXiv 2103.00039, algorithm 1 with tree aggregation. With ``s_t`` the sum of the clipped updates of round t, what is
released after t rounds is the prefix sum

    S_t = s_1 + ... + s_t + sum over nodes v of t of n_v        n_v ~ N(0, (z C)^2 I)

over the nodes of a binary tree that make up 1..t: for each bit h that is set in t the node of ``2^h`` rounds ending at
``(t >> h) << h``. So S_t has popcount(t) <= log2(t) + 1 times the noise variance of a node, where independent noise in
each round has t. An aggregation rule gets the difference ``(S_t - S_{t-1}) / m``, and adds these up: any server
optimiser does (with momentum, DP-FTRLM). A new node takes the noise of the smaller ones that it covers away again.

A client takes part at most ``participations`` times, ``min_separation`` rounds or more apart; the server leaves out an
update beyond that (`privacy.accounting.TreeGaussian` is what that costs). The noise of a node is not improved by the
nodes below it (Honaker's estimate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fl.config import setting
from fl.errors import ConfigError
from fl.state import Update
from privacy.accounting import Mechanism, TreeGaussian
from privacy.base import Guard, Statement
from privacy.client_level import ServerGuard, TrustedServer, gaussian

if TYPE_CHECKING:
    from clients.adapters.space import Space
    from fl.experiment import Settings


@dataclass(frozen=True)
class TreeRounds(Mechanism):
    """The first ``steps`` rounds of a tree: a step is a leaf. The cost of a prefix is that of the tree cut off there.

    ``a + b`` steps are one tree of a + b leaves; a ledger has one `TreeRounds` alone.
    """

    noise_multiplier: float = setting(gt=0, help="z: standard deviation of a node's noise, in units of the clip norm C")
    participations: int = setting(1, ge=1, help="most rounds in which one client takes part")
    min_separation: int = setting(1, ge=1, help="fewest rounds from one participation to the next")
    steps: int = setting(1, ge=0, help="rounds")

    @property
    def tree(self) -> TreeGaussian:
        leaves = max(self.steps, 1)
        return TreeGaussian(self.noise_multiplier, leaves, self.participations, self.min_separation, min(self.steps, 1))

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        return self.tree.rdp(orders)

    def describe(self) -> str:
        return self.tree.describe()


@dataclass(frozen=True)
class DPFTRL(TrustedServer):
    """Tree aggregation of clipped updates: noise that partly cancels from round to round."""

    participations: int | None = setting(None, ge=1, help="most rounds that one client's updates count in; null: all")
    min_separation: int = setting(1, ge=1, help="fewest rounds from one update of a client that counts to the next")

    def check(self, settings: Settings) -> None:
        super().check(settings)
        rule, adapter = settings.aggregator, settings.adapter
        if not rule.optimizes:
            allowed = "a rule that adds updates up in one basis: noise of earlier rounds could not be taken back"
            raise ConfigError("aggregator", type(rule).__name__, allowed, "Use aggregator=fedavg, or privacy=central.")
        if adapter.form == "alternating":
            allowed = "one that trains the same tensors in each round: a tree's nodes are sums over rounds"
            raise ConfigError("adapter", type(adapter).__name__, allowed, "Use another adapter, or privacy=central.")

    def guard(self, settings: Settings, sizes: Sequence[int], space: Space) -> Guard:
        return DPFTRLGuard(self, settings, sizes)


class DPFTRLGuard(ServerGuard):
    """Keeps the tree and every client's participations.

    ``nodes`` are the tree's nodes of the rounds so far: the level of each, and what names its noise. ``taken`` is how
    often each client's updates have counted, and in which round last.
    """

    name = "DP-FTRL at the server (tree aggregation)"

    def __init__(self, privacy: DPFTRL, settings: Settings, sizes: Sequence[int]):
        rounds, self.separation = settings.schedule.rounds, privacy.min_separation
        most = -(-rounds // self.separation)
        self.most = most if privacy.participations is None else min(most, privacy.participations)
        book = privacy.book(lambda z: TreeRounds(z, self.most, self.separation), rounds, len(sizes))
        super().__init__(privacy, settings, sizes, book)
        self.noise_multiplier: float = book.running.noise_multiplier  # type: ignore[attr-defined]
        self.nodes: dict[int, tuple[int, str]] = {}
        self.taken: dict[int, tuple[int, int]] = {}
        self.left_out = 0

    def counted(self, updates: Sequence[Update], round: int) -> Sequence[Update]:
        leaf, kept = self.book.steps + 1, []
        for update in updates:
            times, last = self.taken.get(update.client, (0, -self.separation))
            if times < self.most and leaf - last >= self.separation:
                self.taken[update.client] = (times + 1, leaf)
                kept.append(update)
            else:
                self.left_out += 1
        return kept

    def noise(self, size: int, round: int, digest: str) -> np.ndarray:
        """Noise of the node that this round completes, less that of the smaller ones it replaces."""
        leaf = self.book.steps
        level = (leaf & -leaf).bit_length() - 1
        # The content is in the key: the same round of another run gets other noise.
        self.nodes[level] = (leaf, digest)
        total = self._node(level, size)
        for smaller in range(level):
            total -= self._node(smaller, size)
            del self.nodes[smaller]
        return total

    def _node(self, level: int, size: int) -> np.ndarray:
        end, digest = self.nodes[level]
        return gaussian(size, self.noise_multiplier * self.clip, self.root, "tree", level, end >> level, digest)

    def statement(self) -> Statement:
        left = f"; {self.left_out} updates of clients over that bound were left out" if self.left_out else ""
        return self.claim(
            "none is assumed: whoever is asked, whenever, if clients' data do not decide it",
            f"each client's whole update to L2 norm C = {self.clip:g}",
            f"Gaussian, {self.noise_multiplier:.4g} x C at each node of a binary tree over the rounds, divisor "
            f"{self.cohort}, drawn by the server from {self.source('server')}",
            f"at most {self.most} of {self.rounds} rounds of a client, {self.separation} or more apart; "
            f"{self.book.steps} rounds taken{left}",
            1.0,
        )

    def state(self) -> dict:
        return {
            **super().state(),
            "nodes": {str(level): list(node) for level, node in self.nodes.items()},
            "taken": {str(client): list(times) for client, times in self.taken.items()},
            "left_out": self.left_out,
        }

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.nodes = {int(level): (end, digest) for level, (end, digest) in state["nodes"].items()}
        self.taken = {int(client): (times, last) for client, (times, last) in state["taken"].items()}
        self.left_out = state["left_out"]
