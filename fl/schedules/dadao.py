"""DADAO on a convex head: gradients and pairwise exchanges at the events of Poisson clocks (`fl.gossip.dadao`).

Peers hold the features of their own samples, which a frozen network computes once, and minimise the mean of their
softmax regressions (`clients.heads`): ``mu = l2``, and L is the largest of the peers' own bounds unless it is given. A
gradient is that of all of a peer's samples. ``local`` is of no effect: there are no local steps.

Time is the clocks' own: a unit (``unit_s``) is the mean time between two gradients of a peer, in which the edges are
used ``lam = rate_factor sqrt(2 chi1 chi2)`` times in all, with chi1 and chi2 those of the shares of the edges. At
``rate_factor`` 1 that is the least with which the method converges. Exchanges take no time beside that, so what they
cost shows as vectors and bytes. A round is a report after ``round_s``: the mean of the peers' x is evaluated, with its
objective and the norm of its gradient ``g``, for which ``f(x) - min f <= |g|^2 / (2 mu)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clients.adapters.head import Head
from clients.behaviours.none import Honest
from clients.heads import SoftmaxHead, features, linear_head
from fl.clock import ticks
from fl.config import setting
from fl.errors import ConfigError, RunStopped
from fl.gossip.dadao import Dadao, X
from fl.gossip.engine import Engine
from fl.gossip.rates import Rates, optimal, uniform
from fl.messages import MalformedMessage, PeerRequest, Request, TrainReply
from fl.network import Instant
from fl.schedules.ad_psgd import check_edges
from fl.schedules.base import Event, Parts, Schedule, World
from fl.validation import Rejection
from privacy.none import NoPrivacy

if TYPE_CHECKING:
    from fl.experiment import Experiment

_PREFIX = "dadao/"


@dataclass(frozen=True)
class DADAO(Schedule):
    """Accelerated, asynchronous, and without inner loops; ``rounds`` counts reports."""

    rounds: int = setting(20, ge=1, help="reports, one after every round_s")
    round_s: float = setting(10.0, gt=0, le=1e9, help="virtual seconds between reports")
    unit_s: float = setting(1.0, gt=0, le=1e9, help="virtual seconds between two gradients of a peer, on average")
    rates: str = setting("uniform", choices=["uniform", "optimal"], help="shares of the edges; optimal needs cvxpy")
    rate_factor: float = setting(1.0, ge=1, help="communication over the least that DADAO converges with")
    l2: float = setting(0.01, gt=0, help="weight of the squared norm: the strong convexity mu")
    smoothness: float | None = setting(None, gt=0, help="L; null: the largest of the peers' own bounds")

    decentral = True

    def __post_init__(self) -> None:
        for name in ("round_s", "unit_s"):
            if ticks(getattr(self, name)) == 0:
                raise ConfigError(f"schedule.{name}", getattr(self, name), "at least one microsecond")

    def check(self, settings: Any) -> None:
        check_edges(self, settings)
        if not isinstance(settings.adapter, Head):
            allowed = "head with schedule=dadao, which needs convex objectives"
            way_out = "Use adapter=head, or schedule=a2cid2 for adapters that are not convex."
            raise ConfigError("adapter", type(settings.adapter).__name__, allowed, way_out)
        if not isinstance(settings.privacy, NoPrivacy):
            allowed = "none with schedule=dadao: what it sends is made of exact gradients"
            raise ConfigError("privacy", type(settings.privacy).__name__, allowed)
        if not isinstance(settings.attack, Honest):
            raise ConfigError("attack", type(settings.attack).__name__, "none with schedule=dadao")
        if not isinstance(settings.network, Instant):
            allowed = "instant with schedule=dadao, whose clocks say when things happen"
            raise ConfigError("network", type(settings.network).__name__, allowed)
        for name in ("latency_s", "mbps"):
            if getattr(settings.topology, name) is not None:
                allowed = "null with schedule=dadao: exchanges take no time beside the clocks'"
                raise ConfigError(f"topology.{name}", getattr(settings.topology, name), allowed)

    def part(self, experiment: Experiment) -> HeadPart:
        return HeadPart(experiment, self.l2)

    def expects(self, request: Request) -> Mapping[str, tuple[str, int]]:
        if "point" not in request.arrays:
            return {"smoothness": ("float64", 1)}
        return {"gradient": ("float64", len(request.arrays["point"])), "loss": ("float64", 1)}

    def run(self, world: World) -> Iterator[Event]:
        run = _Run(self, world)
        world.keep = run.parts
        while world.server.round < self.rounds:
            yield run.report(world.server.round + 1)
        assert world.peers is not None
        yield {"event": "links", "round": world.server.round, "links": world.peers.links()}


class _Run:
    """One run: the engine, what peers are asked, and what is reported."""

    def __init__(self, settings: DADAO, world: World):
        assert world.peers is not None
        self.settings, self.world, self.peers = settings, world, world.peers
        number = len(self.peers)
        kept = {} if world.kept is None else world.kept[0]
        self.asked = np.array(kept.get(_PREFIX + "asked", np.zeros(number)), dtype=np.int64)  # requests to each peer
        known = kept.get(_PREFIX + "smoothness")
        smoothness = settings.smoothness if known is None else float(known[0])
        self.smoothness = self._curvature() if smoothness is None else smoothness
        method = Dadao(self.peers.states.astype(np.float64), self.smoothness, settings.l2, self._rates())
        self.engine = Engine(method, self.gradients, world.seed, ticks(settings.unit_s))
        if world.kept is not None:
            self.peers.restore(kept)
            self.engine.restore({n.removeprefix(_PREFIX): a for n, a in kept.items() if n.startswith(_PREFIX)})

    def _rates(self) -> Rates:
        graph = self.peers.graph(1)
        made = (uniform if self.settings.rates == "uniform" else optimal)(len(self.peers), graph.edges)
        return made.times(made.needed * self.settings.rate_factor)

    def parts(self) -> Parts:
        own = {**self.engine.parts(), "asked": self.asked.copy(), "smoothness": np.array([self.smoothness])}
        return self.peers.arrays() | {_PREFIX + name: array for name, array in own.items()}, {}

    def _ask(self, peers: np.ndarray, points: np.ndarray | None) -> list[TrainReply]:
        """The peers' answers, at their ``points`` ``(k, d)``. Raises `RunStopped` where one has none."""
        world, requests = self.world, []
        for row, peer in enumerate(peers.tolist()):
            self.asked[peer] += 1
            arrays = {} if points is None else {"point": points[row]}
            requests.append(
                PeerRequest(
                    peer, int(self.asked[peer]), world.server.version, np.zeros(0, np.float32),
                    world.server.layout.hash, {}, arrays,
                )
            )  # fmt: skip
        answers = world.query(requests)
        for peer, answer in zip(peers.tolist(), answers, strict=True):
            finite = isinstance(answer, TrainReply) and all(np.isfinite(a).all() for a in answer.arrays.values())
            if not finite:
                detail = answer.detail if isinstance(answer, Rejection) else "numbers that are not finite"
                raise RunStopped(
                    f"Peer {peer} gave no gradient ({detail}), and DADAO can't go on without one. `shoal run --resume "
                    "DIR` goes on from the last report."
                )
        world.validator.forget(int(self.asked.min()))  # who is asked more often never repeats a number
        return [answer for answer in answers if isinstance(answer, TrainReply)]

    def gradients(self, peers: np.ndarray, points: np.ndarray) -> np.ndarray:
        return np.stack([answer.arrays["gradient"] for answer in self._ask(peers, points)])

    def _curvature(self) -> float:
        answers = self._ask(np.arange(len(self.peers)), None)
        return max(float(answer.arrays["smoothness"][0]) for answer in answers)

    def report(self, round: int) -> Event:
        """Go on to the end of ``round``; its event."""
        world, engine, peers = self.world, self.engine, self.peers
        before, uses = engine.gradients.sum(), engine.uses.copy()
        end = round * ticks(self.settings.round_s)
        engine.run(end)
        edges, size = (
            engine.method.rates.edges,
            peers.size(world.server.layout.hash, {"y+z": ("float64", engine.points.shape[1])}),
        )
        once = (engine.uses - uses) * size  # bytes each way
        np.add.at(peers.traffic, (edges[:, 0], edges[:, 1]), once)
        np.add.at(peers.traffic, (edges[:, 1], edges[:, 0]), once)
        models = engine.method.at(end / engine.unit)[:, X]
        mean = models.mean(axis=0)
        peers.states = models.astype(np.float32)
        peers.ready[:] = end
        moved = float(np.linalg.norm(mean - world.server.vector))
        world.server = world.server.replace(
            vector=mean.astype(np.float32), version=world.server.version + 1, round=round
        )
        world.pass_to(end)
        everyone = np.arange(len(peers))
        looked = self._ask(everyone, np.repeat(mean[None], len(peers), axis=0))
        slope = np.mean([answer.arrays["gradient"] for answer in looked], axis=0)
        taken = int(engine.gradients.sum() - before)
        return {
            "event": "round",
            "round": round,
            "version": world.server.version,
            "virtual_s": world.clock.now_s,
            "sampled": taken,
            "accepted": taken,
            "rejected": {},
            "bytes_down": int(2 * once.sum()),
            "bytes_up": int(2 * once.sum()),
            "client_steps": taken,
            "tokens": 0,
            "loss": float(np.mean([answer.arrays["loss"][0] for answer in looked])),
            "update_norm": moved,
            "bytes_once": 0,
            "aggregation_error": None,
            "epsilon": world.guard.epsilon,
            "staleness": 0.0,
            "live_versions": len(peers),
            "consensus": float(np.sqrt(np.square(models - mean).sum(axis=1).mean())),
            "bytes_links": int(2 * once.sum()),
            "gradients": int(engine.gradients.sum()),
            "communications": int(engine.uses.sum()),
            "gradient_norm": float(np.linalg.norm(slope)),
        }


class HeadPart:
    """The nodes' half: each peer's objective, from features that are computed when it is first asked."""

    def __init__(self, experiment: Experiment, l2: float):
        self.worker, self.data, self.l2 = experiment.trainer.worker, experiment.data, l2
        linear_head(self.worker.cohort)
        self.batch_size = experiment.settings.evaluation.batch_size
        self.problems: dict[int, SoftmaxHead] = {}

    def problem(self, client: int) -> SoftmaxHead:
        """The objective of `client`."""
        if client not in self.problems:
            train, examples = self.data.train, self.data.parts[client]
            order = examples[np.argsort(np.asarray(train.lengths)[examples], kind="stable")]
            cuts = [order[low : low + self.batch_size] for low in range(0, len(order), self.batch_size)]
            rows = [features(self.worker.cohort, self.worker._batch("train", [cut], None)) for cut in cuts]
            assert train.labels is not None
            bias = linear_head(self.worker.cohort).bias_name is not None
            labels = np.asarray(train.labels)[order].astype(np.int64)
            made = SoftmaxHead(np.concatenate(rows), labels, len(train.label_names), self.l2, bias)
            self.problems[client] = made
        return self.problems[client]

    def answer(self, requests: Sequence[PeerRequest]) -> list[TrainReply | MalformedMessage]:
        return [self._one(request) for request in requests]

    def _one(self, request: PeerRequest) -> TrainReply | MalformedMessage:
        problem, point = self.problem(request.client), request.arrays.get("point")
        if point is None:
            arrays = {"smoothness": np.array([problem.smoothness()])}
        elif point.dtype != np.float64 or point.shape != (problem.size,):
            return MalformedMessage("shape", f"a point is float64 ({problem.size},), not {point.dtype} {point.shape}")
        else:
            arrays = {"gradient": problem.gradient(point), "loss": np.array([problem.loss(point)])}
        return TrainReply(
            request.client, request.round, request.version, request.layout, np.zeros(0, np.float32), 1, 0, 0, None,
            arrays=arrays,
        )  # fmt: skip

    def arrays(self, client: int | None = None) -> dict[str, np.ndarray]:
        return {}  # features are those of the frozen network: computed again

    def restore(self, arrays: Mapping[str, np.ndarray], client: int | None = None) -> None:
        pass
