"""Rules that trust by direction: FLTrust by an update of the server's own, FoolsGold by how diverse clients are.

FLTrust (Cao et al., arXiv 2012.13995), with g0 the update that the server made from clean data of its own:

    T_i = max(0, cos(u_i, g0)),     outcome = sum_i T_i (||g0|| / ||u_i||) u_i / sum_i T_i      (0 if all T_i are)

FoolsGold (Fung et al., arXiv 1808.04866), with H_i the sum of all updates of client i so far, c_ij = cos(H_i, H_j):

    v_i = max_j c_ij;   where v_j > v_i: c_ij <- c_ij max(0, v_i) / v_j          (honest clients are pardoned)
    a_i = 1 - max_j c_ij, cut to [0, 1], over the largest;   a_i <- log(a_i / (1 - a_i)) + 1/2, cut to [0, 1]
    outcome = sum_i a_i u_i / sum_i a_i      (0 if all a_i are)

It makes no promise: one hostile client alone looks like nobody and passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aggregators.robust.base import Cloud, NoPre, Pre, Rule
from fl.config import setting
from fl.errors import ConfigError

_SURE = 0.99  # FoolsGold's largest weight before the logit, which is infinite at one


@dataclass(frozen=True)
class FLTrust(Rule):
    """The mean by cosines with the server's own update, each update cut or stretched to its norm."""

    root = True

    def least(self, f: int) -> int:
        return 1

    def weigh(self, cloud: Cloud, f: int) -> Tensor:
        assert cloud.root is not None
        gram = cloud.geometry.gram
        points, root = cloud.points - cloud.origin, cloud.root - cloud.origin
        along = (points @ gram @ root).numpy()
        norms = np.sqrt(cloud.squared_from(cloud.origin))
        own = float(torch.sqrt((root @ gram @ root).clamp(min=0)))
        lengths = norms * own
        trust = np.maximum(0.0, np.divide(along, lengths, out=np.zeros_like(along), where=lengths > 0))
        if trust.sum() == 0:
            return cloud.origin
        pull = trust / trust.sum() * np.divide(own, norms, out=np.zeros_like(norms), where=norms > 0)
        return (1 - pull.sum()) * cloud.origin + torch.from_numpy(pull) @ cloud.points


@dataclass(frozen=True)
class FoolsGold(Rule):
    """The mean by weights that fall for clients whose (summed) updates point the same way."""

    history: bool = setting(True, help="compare sums of all rounds' updates, instead of this round's")

    @property
    def stateful(self) -> bool:
        return self.history

    def least(self, f: int) -> int:
        return 1

    def check(self, n: int, f: int, pre: Pre) -> None:
        if not isinstance(pre, NoPre):
            name = type(pre).__name__
            raise ConfigError("aggregator.pre", name, "none: FoolsGold compares clients, and mixed updates have none")
        super().check(n, f, pre)

    def weigh(self, cloud: Cloud, f: int) -> Tensor:
        weights = diversity(cloud.products(cloud.origin))
        return cloud.origin if weights.sum() == 0 else cloud.mean(weights)

    def view(self, rows: Tensor, clients: Sequence[int], memory: Mapping[str, np.ndarray]) -> Tensor:
        if not self.history:
            return rows
        sums = rows.to(torch.float64, copy=True)
        at = {int(c): i for i, c in enumerate(memory.get("clients", ()))}
        for i, client in enumerate(clients):
            if client in at:
                sums[i] += torch.from_numpy(memory["sums"][at[client]]).to(rows.device)
        return sums

    def keep(
        self, vector: Tensor, view: Tensor, clients: Sequence[int], memory: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """``clients`` ``(k,)`` int64, rising, and their ``sums`` ``(k, d)`` float64."""
        if not self.history:
            return {}
        if not len(memory.get("clients", ())) and list(clients) == sorted(clients):
            return {"clients": np.array(clients, np.int64), "sums": view.cpu().numpy()}
        sums = dict(zip((int(c) for c in memory.get("clients", ())), memory.get("sums", ()), strict=True))
        sums |= {int(client): row.cpu().numpy() for client, row in zip(clients, view, strict=True)}
        order = sorted(sums)
        return {"clients": np.array(order, np.int64), "sums": np.stack([sums[c] for c in order])}


def diversity(products: np.ndarray) -> np.ndarray:
    """FoolsGold's weights ``(n,)`` from the inner products ``(n, n)`` of the clients' sums; without others: one."""
    n = len(products)
    if n == 1:
        return np.ones(1)
    norms = np.sqrt(np.maximum(np.diag(products), 0))
    lengths = norms[:, None] * norms[None, :]
    cosines = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0).clip(-1, 1)
    np.fill_diagonal(cosines, -np.inf)
    nearest = cosines.max(axis=1)
    pardon = np.ones((n, n))
    above = nearest[None, :] > nearest[:, None]
    top = np.broadcast_to(nearest[None, :], (n, n))
    np.divide(np.maximum(nearest, 0)[:, None], top, out=pardon, where=above & (top > 0))
    np.fill_diagonal(cosines, 0)
    pardoned = cosines * pardon
    np.fill_diagonal(pardoned, -np.inf)
    weights = (1 - pardoned.max(axis=1)).clip(0, 1)
    if weights.max() == 0:
        return weights
    weights = np.minimum(weights / weights.max(), _SURE)
    with np.errstate(divide="ignore"):
        return (np.log(weights / (1 - weights)) + 0.5).clip(0, 1)
