"""What peers make of the models that they hear, hostile ones among them.

Honest peers send their models. Hostile ones send what their behaviour crafts (`clients.behaviours`), the same to all
or something else to each receiver. What is not finite, or further from the receiver's own model than
``schedule.max_update_norm``, is dropped: the receiver's own model counts in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from aggregators.combining import Combining
from clients.behaviours.base import Facts
from fl.errors import ConfigError, RunStopped
from fl.mixing import Mixing

if TYPE_CHECKING:
    from fl.schedules.gossip import Round


def average(round: Round, models: np.ndarray) -> np.ndarray:
    """``(n, d)``: the peers' ``models`` ``(n, d)`` mixed over the graph by the run's aggregation rule.

    Under the plain mean it is one matrix product, in which a hostile peer's row is what it says, and its own part in
    its own model is honest.
    """
    attack, rule = round.world.attack, round.world.aggregator
    assert isinstance(rule, Combining)
    bad = round.hostile(attack)
    if not rule.plain or (bad and attack.peers_only):
        return hear(round, rule, models, None)
    if not bad:
        return round.mixing.mean(models)
    said = craft(round, rule, models, bad, None)
    heard = models.copy()
    silent = set()
    centre = models.mean(axis=0, dtype=np.float64)
    for peer, row in said.items():
        norm = float(np.linalg.norm(row - centre))
        if norm <= round.world.max_update_norm:
            heard[peer] = row
        else:
            silent.add(peer)
            round.refuse(norm)
    mixing = Mixing(round.mixing.graph, round.mixing.lost | silent, round.mixing.pushes)
    mixed, diagonal = mixing.mean(heard), mixing.weights.diagonal()
    for peer in bad:
        mixed[peer] += (diagonal[peer] * (models[peer] - heard[peer])).astype(mixed.dtype)
    return mixed


def hear(round: Round, rule: Combining, models: np.ndarray, heard: Mapping[int, np.ndarray] | None) -> np.ndarray:
    """``models`` ``(n, d)`` with each peer's row combined by ``rule`` with what it has heard.

    ``heard`` are the peers whose models each takes in, with equal weights; None: all neighbours, with the graph's
    weights. A peer that is lost, or hears fewer than the rule needs, keeps its model. Raises `RunStopped` where all do
    and none was lost.
    """
    world, mixing = round.world, round.mixing
    bad = round.hostile(world.attack)
    said = craft(round, rule, models, bad, None) if bad and not world.attack.peers_only else {}
    out, short = models.copy(), 0
    present = [p for p in range(len(models)) if p not in mixing.lost]
    for peer in present:
        near = mixing.heard(peer) if heard is None else heard[peer]
        own = models[peer]
        rows = models[near]
        if peer not in bad:
            if bad and world.attack.peers_only:
                said = craft(round, rule, models, bad, peer)
            for at, j in enumerate(near.tolist()):
                rows[at] = said.get(j, rows[at])
        gap = np.concatenate([rows - own, np.zeros((1, len(own)), own.dtype)])
        norms = np.linalg.norm(gap.astype(np.float64), axis=1)
        far = ~(norms <= world.max_update_norm)
        for norm in norms[far].tolist():
            round.refuse(norm)
        gap[far] = 0
        weights = np.full(len(gap), 1 / len(gap)) if heard is not None else mixing.row(peer, [*near.tolist(), peer])
        try:
            rule.check_round(len(gap))
        except ConfigError:
            short += 1
            continue
        key = (world.seed, "mixing", round.number, peer)
        out[peer] = own + rule.step(gap, weights, [*near.tolist(), peer], key)
    round.short = short
    if present and short == len(present) and not mixing.lost:
        raise RunStopped(
            f"In round {round.number} no peer hears as many others as {type(rule.combine).__name__} needs for "
            f"f = {rule.f}. Use a denser topology, a smaller aggregator.f, or fewer losses (network.dropout)."
        )
    return out


def craft(
    round: Round, rule: Combining, models: np.ndarray, bad: Sequence[int], receiver: int | None
) -> dict[int, np.ndarray]:
    """What the ``bad`` peers send in place of their ``models``: to all, or to ``receiver``."""
    world = round.world
    honest = [p for p in range(len(models)) if p not in {*bad, *round.mixing.lost}]
    if not honest:
        return {}
    columns = round.columns  # what never trains is never sent

    def defence(rows: np.ndarray) -> np.ndarray:
        """The rule on all that is sent, about its mean."""
        centre = rows.mean(axis=0)
        return centre + rule.of_rows(rows - centre)

    facts = Facts(
        world.seed, round.number, list(bad), honest, states=True, starts=round.peers.states[list(bad)][:, columns],
        rule=defence, receiver=None if receiver is None else models[receiver, columns], space=world.server.space,
        columns=None if len(columns) == models.shape[1] else columns,
    )  # fmt: skip
    said = models[list(bad)].copy()
    said[:, columns] = world.attack.craft(models[honest][:, columns], said[:, columns], facts)
    return dict(zip(bad, said, strict=True))
