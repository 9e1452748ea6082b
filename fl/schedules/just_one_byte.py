"""Just One Byte: peers without a server that keep replicas of one model equal by sending scalars.

In round t every peer k probes its own data along S = ``local.steps`` directions that all can regenerate from a key, and
sends each of the others S scalars, of one byte each; all apply all scalars in the same order::

    g_ks = (L_k(theta + eps z_tks) - L_k(theta - eps z_tks)) / (2 eps)      L_k: mean loss of its s-th minibatch
    theta <- theta - lr g_ks z_tks / norm,  for k rising, s = 0 .. S - 1    norm = n, the number of scalars, or sqrt(n)

(arXiv 2306.10015, on top of MeZO, arXiv 2305.17333.) g is what its byte decodes to, at the sender too, and theta is
restored from a copy after each probe: so replicas are equal bit for bit, which is checked by their hashes. Whoever
joins, or was away, replays the scalars that it lacks, or is sent a snapshot (4 d bytes).

The published program divides by sqrt(n), so that its step grows with the number of directions; n takes their mean.

Code: `fl.one_byte`. The size of the step is ``local.lr`` and follows ``local.lr_schedule``; ``local`` trains nothing by
itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clients.behaviours.none import Honest
from clients.local.optimizers import SGD
from clients.local.training import LocalTraining
from fl.config import setting
from fl.messages import Request
from fl.one_byte.codec import WIDTH
from fl.one_byte.log import Rule
from fl.one_byte.losses import losses_of
from fl.one_byte.membership import HOW, Membership
from fl.one_byte.mesh import Mesh
from fl.one_byte.replicas import Replicas
from fl.schedules.base import Event, PeerPart, Schedule, World, demand
from fl.schedules.gossip import check_peers
from fl.topology.auto import Auto
from fl.topology.fixed import Complete
from privacy.none import NoPrivacy

if TYPE_CHECKING:
    from clients.adapters.space import Space
    from fl.experiment import Experiment

MOST = 255  # scalars of a peer and round: their number is a byte of the log


@dataclass(frozen=True)
class JustOneByte(Schedule):
    """Shared randomness: a peer's round is S scalars. ``rounds`` is how often all scalars are exchanged."""

    eps: float = setting(1e-2, gt=0, le=10, help="length of a probe's step along its direction")
    norm: str = setting("n", choices=["n", "sqrt_n"], help="what the sum over a round's n directions is divided by")
    quantiser: str = setting(
        "int8log", choices=list(WIDTH), help="how a scalar travels: int8log (1 byte) or none (4 bytes)"
    )
    clip_g: float | None = setting(
        None, gt=0, help="all peers bound each scalar they hear to this size; null: no bound"
    )
    hash_every: int = setting(16, ge=1, help="rounds between comparisons of all replicas' hashes")
    differing: str = setting(
        "stop", choices=["stop", "rejoin"], help="where a replica differs: stop, or it begins again from a snapshot"
    )
    catch_up: str = setting("replay", choices=HOW, help="how a peer that missed rounds gets what it lacks")
    joins: list[list[int | str]] | None = setting(
        None, help="rows [round, peer, replay or snapshot]: who joins and how; null: nobody"
    )
    leaves: list[list[int]] | None = setting(None, help="rows [round, peer]: who leaves; null: nobody")

    decentral = True
    graph = "complete"

    def __post_init__(self) -> None:
        Membership.of(self.joins, self.leaves)

    @property
    def membership(self) -> Membership:
        """Who joins and who leaves."""
        return Membership.of(self.joins, self.leaves)

    def participations(self) -> int | None:
        return self.rounds

    def check(self, settings: Any) -> None:
        check_peers(self, settings)
        need = demand("under JustOneByte")
        s, local = settings, settings.local
        topology = s.topology
        need("topology", topology, isinstance(topology, Auto | Complete), "auto or complete: everybody hears everybody")
        need("attack", s.attack, isinstance(s.attack, Honest), "none: the attacks are on updates, and none is sent")
        need("aggregator.combine", s.aggregator.combine, s.aggregator.plain, "auto: scalars are summed")
        known = isinstance(s.privacy, NoPrivacy) or getattr(s.privacy, "scalars", False)
        need("privacy", s.privacy, known, "none or dp_zero: what leaves a peer are scalars")
        need("local", local, type(local) is LocalTraining, "a plain one: nothing but lr, steps and batch_size is used")
        optimizer = local.optimizer
        need("local.optimizer", optimizer, optimizer == SGD(), "plain sgd: all apply a step as it is", "Use local=sgd.")
        need("local.epochs", local.epochs, local.epochs is None, "null: local.steps is the number of directions")
        need("local.steps", local.steps, (local.steps or 0) <= MOST, f"at most {MOST}, the directions of a round")
        need("local.clip_norm", local.clip_norm, local.clip_norm is None, "null", "Use schedule.clip_g.")
        need("adapter", s.adapter, s.adapter.form not in ("alternating", "gated"), "one whose tensors always train")
        start = s.adapter.initialisation
        kept = start is None or not start.changes_base
        need("adapter/init", start, kept, "one that leaves the base as it is")
        if s.clients.number is not None:
            self.membership.check(s.clients.number)

    def agreement(self, seed: int, space: Space, local: LocalTraining) -> Rule:
        """What all peers turn scalars into a state by."""
        lrs = [local.lr_at(round, self.rounds) for round in range(1, self.rounds + 1)]
        return Rule(seed, space.columns(space.trains(1)), lrs, self.quantiser, self.norm, self.clip_g)

    def part(self, experiment: Experiment) -> PeerPart:
        s, data, space = experiment.settings, experiment.data, experiment.trainer.worker.cohort.space
        rule, losses = self.agreement(s.seed, space, s.local), losses_of(experiment.trainer)
        lengths = np.asarray(data.train.lengths)
        return Replicas(losses, lengths, space.layout.size, data.parts, s.local, experiment.guard, rule, self.eps)

    def expects(self, request: Request) -> Mapping[str, tuple[str, int]]:
        kinds = {"probe": ("scalars", "uint8", -1), "hash": ("hash", "uint8", 32), "snapshot": ("state", "float32", -1)}
        return {name: (dtype, size) for asked, (name, dtype, size) in kinds.items() if request.extra.get(asked)}

    def run(self, world: World) -> Iterator[Event]:
        mesh = Mesh(self, world, self.agreement(world.seed, world.server.space, world.local))
        if world.kept is not None:
            mesh.restore(world.kept)
        world.keep = mesh.parts
        for number in range(world.server.round + 1, self.rounds + 1):
            reason = world.guard.stopped()
            if reason is not None:
                yield mesh.finish(number - 1)
                yield {"event": "stop", "round": number - 1, "virtual_s": world.clock.now_s, "reason": reason}
                break
            yield from mesh.round(number)
        yield {"event": "links", "round": world.server.round, "links": mesh.peers.links()}
