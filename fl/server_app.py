"""The server, run as a Flower ServerApp: drives a schedule; records, evaluates and checkpoints at its events."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from aggregators.combining import Combining
from clients.data.at_nodes import AtNodes
from fl import checkpoint, metrics
from fl.clock import Clock
from fl.downlink import Downlink
from fl.engine.cohort_grid import CohortGrid
from fl.errors import ConfigError, ShoalError
from fl.experiment import Experiment
from fl.initialise import initialise
from fl.ledger import Ledger
from fl.messages import EvaluateReply, PeerRequest, Request, payload_bytes
from fl.peers import Peers
from fl.progress import Progress
from fl.records import RunFolder
from fl.schedules.base import Event, World
from fl.schedules.direct import is_direct
from fl.secure import MASKED
from fl.shares import names
from fl.state import ServerState
from fl.trackers.tracking import Tracking
from fl.validation import Validator
from privacy.secure_aggregation.settings import SecAggPlus
from privacy.secure_aggregation.shares import SecretShares

CHECKPOINT = "shoal-run-3"


@dataclass
class Server:
    """One run at the server. `final` are the numbers of run.json."""

    experiment: Experiment
    folder: RunFolder
    progress: Progress
    resume: bool = False
    tracking: Tracking | None = None
    ledger: Ledger = field(default_factory=Ledger)
    world: World | None = None
    newest: dict[str, Any] = field(default_factory=dict)  # the last central evaluation
    busy_s: float = 0.0  # wall seconds since training began: rounds with their evaluation and records
    _began: float = field(default_factory=time.perf_counter)
    # Round and version of the last evaluation on the central and on the clients' test sets, and the former's tick.
    _tested: list[int] = field(default_factory=list)
    _asked: list[int] = field(default_factory=list)
    _seen: list[int] = field(default_factory=list)  # of the peers' own models
    _tested_at: int = 0
    stopped: str | None = None  # why the run ended before its last round
    restored: bool = False  # whether the state is that of a checkpoint
    _before_s: float = 0.0  # wall seconds before a resume
    _unsaved: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None  # what `_save` has to save

    @property
    def wall_s(self) -> float:
        return self._before_s + time.perf_counter() - self._began

    def run(self, grid: Grid) -> None:
        """Train to the end of the schedule. Raises `RunStopped`.

        However it ends, by Ctrl-C too, the checkpoint is that of the last round that was finished.
        """
        world = self._world(grid)
        if self.resume:
            self._restore(world)
        if self.experiment.charges is not None:
            self.experiment.charges.restore()  # newer than the checkpoint's books
        self.world = world
        if self.tracking is not None:  # now that worker processes are forked and metrics.jsonl is cut back
            self.tracking.begin()
        try:
            self._train(world)
        except BaseException:
            self._save()
            raise

    def _train(self, world: World) -> None:
        settings = self.experiment.settings
        if not self.restored:
            event = initialise(world, self.experiment)
            if event is not None:
                self._write(self.ledger.record(event))
        if world.peers is not None and world.kept is None:  # before its first round every peer is what the start made
            world.peers.states[:] = world.server.vector
        if not self.restored:
            self._evaluate(world, last=False)
            self._mark(world)
            self._save()
        self.experiment.trainer.on_cohort = lambda fits: self.progress.jobs(len(fits), sum(f.steps for f in fits))
        mark = time.perf_counter()
        for event in settings.schedule.run(world):
            if event["event"] == "stop":
                self._write(event)
                self.stopped = event["reason"]
                continue
            if event["event"] != "round":
                self._write(event)
                continue
            self._write(self.ledger.record(event))
            self._evaluate(world, last=False)
            name = "accuracy" if "accuracy" in self.newest else "perplexity"
            self.progress.round(
                event["round"], event["loss"], name, self.newest.get(name), event["virtual_s"], event["epsilon"]
            )
            self.busy_s += time.perf_counter() - mark
            mark = time.perf_counter()
            # Where models go from node to node, the server knows the state when it is evaluated.
            unknown = world.direct and self._tested != [world.server.round, world.server.version]
            if world.server.round < settings.schedule.rounds and not unknown:
                self._mark(world)
                if world.server.round % settings.checkpoint_every == 0:
                    self._save()
        self._evaluate(world, last=True)
        self._mark(world)
        self._save()

    def _world(self, grid: Grid) -> World:
        experiment, s = self.experiment, self.experiment.settings
        cohort = experiment.trainer.worker.cohort
        space = cohort.space
        server = ServerState(cohort.initial.numpy().astype(np.float32), space)
        nodes = grid.everyone if isinstance(grid, CohortGrid) else sorted(grid.get_node_ids())
        if len(nodes) != len(experiment.data):
            raise ShoalError(f"The grid has {len(nodes)} clients; the partition made {len(experiment.data)}.")
        sizes = [len(part) for part in experiment.data.parts]

        def weight(client: int) -> int:  # of samples that are at nodes the server knows what each has told
            return sizes[client] if isinstance(s.partition, AtNodes) else len(experiment.data.train)

        secure = s.secure_aggregation if isinstance(s.secure_aggregation, SecAggPlus | SecretShares) else None
        codecs = None if secure is None else experiment.codecs

        def size(request: Request) -> int:
            if codecs is not None or isinstance(request, PeerRequest):
                return 0
            trained = tuple(str(request.extra["train"]).split(",")) if "train" in request.extra else ()
            return len(space.columns(trained or space.trains(request.round), request.client))

        def arrays(request: Request) -> Mapping[str, tuple[str, int]]:
            if isinstance(request, PeerRequest):
                return s.schedule.expects(request)
            if codecs is None:
                return {}
            if isinstance(secure, SecretShares):
                return dict.fromkeys(names(secure.servers), ("uint8", -1))
            codec = codecs(request.round)
            return {MASKED: (codec.dtype.name, codec.length)}

        bound = s.schedule.max_update_norm
        validator = Validator(space.layout.hash, size, bound, max_weight=weight, arrays=arrays)
        keeps = s.aggregator.stateful or space.constant or s.adapter.initialisation is not None
        peers = None
        if s.schedule.decentral:
            hostile = s.attack.affected(len(nodes), s.seed)
            peers = Peers.of(server, s.graph, s.seed, len(nodes), hostile)
        downlink = Downlink(space, keeps and peers is None, own=peers is not None)
        rooted = isinstance(s.aggregator, Combining) and s.aggregator.combine.root
        return World(
            grid, nodes, s.seed, experiment.per_round, server, s.aggregator, s.server_optimizer, s.sampling, s.network,
            s.local, validator, downlink, experiment.guard, secure, codecs,
            s.evaluation.aggregation_error and bool(space.modules), sizes=sizes,
            treatment=s.schedule.rule(s.aggregator.staleness).treatment(experiment),
            root=experiment.root_update if rooted else None, peers=peers, attack=s.attack, apart=s.engine.remote,
            direct=s.schedule.decentral and is_direct(s), limit_s=getattr(s.schedule, "deadline_s", None),
            due=lambda round: s.evaluation.central(round, round == s.schedule.rounds, self._tested_at, self._now()),
            book=grid.places.book if isinstance(grid, CohortGrid) else dict,
        )  # fmt: skip

    def _now(self) -> int:
        return 0 if self.world is None else self.world.clock.now

    def _write(self, event: Event) -> None:
        event = {**event, "wall_s": round(self.wall_s, 3)}
        self.folder.append(event)
        if self.tracking is not None:
            self.tracking.event(event)

    def _evaluate(self, world: World, last: bool) -> None:
        """Evaluate where it is due after the round of ``world.server``; moves no random stream and no clock."""
        when, round = self.experiment.settings.evaluation, world.server.round
        common = {"round": round, "virtual_s": world.clock.now_s}
        central, state = when.central(round, last, self._tested_at, world.clock.now), [round, world.server.version]
        if central and self._tested != state:
            self._tested, self._tested_at = state, world.clock.now
            self.newest = self.experiment.central(self.experiment.trainer, world.server.vector, world.server.base)
            self._write({"event": "eval", **common, "split": "test", **self.newest})
        if world.peers is not None and when.of_peers(central, last) and self._seen != state:
            self._seen = state
            self._write({"event": "eval", **common, "split": "peers", **self._peers(world)})
        if when.per_client(central, last) and self._asked != state:
            self._asked = state
            event = self._per_client(world)
            if event is not None:
                self._write({"event": "eval", **common, "split": "clients", **event})

    def _peers(self, world: World) -> Event:
        """Each peer's own model on the central test set."""
        assert world.peers is not None
        trainer, name = self.experiment.trainer, "accuracy" if self.experiment.num_labels else "perplexity"
        known: dict[bytes, float] = {}  # equal models are evaluated once
        values: list[float | None] = []
        for state in world.peers.states:
            key = hashlib.sha256(state.tobytes()).digest()
            if key not in known:
                known[key] = self.experiment.central(trainer, state, world.server.base)[name]
            values.append(known[key])
        honest = [values[p] for p in world.peers.honest]
        return {**_spread(name, honest), "per_client": values, "hostile": sorted(world.peers.hostile)}

    def _per_client(self, world: World) -> Event | None:
        requests = [world.evaluate_request(c, world.server) for c in range(world.number)]
        replies, sent = world.ask(requests)
        world.validator.forget(world.server.round + 1)
        checked = [(c, world.validator.check_evaluation(m, requests[c])) for c, m in replies]
        name = "accuracy" if self.experiment.num_labels else "perplexity"
        good = {c: r for c, r in checked if isinstance(r, EvaluateReply) and r.examples > 0 and name in r.metrics}
        if not good:
            return None
        values = [float(good[c].metrics[name]) if c in good else None for c in range(world.number)]  # type: ignore[arg-type]
        return {
            **_spread(name, values),
            "per_client": values,
            "loss_mean": float(np.mean([r.loss for r in good.values()])),
            "bytes_down": sum(sent.values()),
            "bytes_up": sum(payload_bytes(m.content) for _, m in replies if not m.has_error()),
        }

    def _mark(self, world: World) -> None:
        """Note where a finished round leaves the run: everything that the rest of it depends on, for `_save`."""
        arrays, server = world.server.parts()
        downlink, sent = world.downlink.parts()
        kept, schedule = ({}, None) if world.keep is None else world.keep()
        arrays |= downlink | kept
        if not self.experiment.settings.engine.remote:
            arrays |= self.experiment.node.arrays()
        meta = {
            "downlink": sent,
            "schedule": schedule,
            "tested": [self._tested, self._asked, self._tested_at, self._seen],
            "kind": CHECKPOINT,
            "server": server,
            "clock": world.clock.now,
            "fleet": world.fleet.state(),
            "ledger": self.ledger.state(),
            "privacy": world.guard.state(),
            "newest": self.newest,
            "metrics_offset": self.folder.offset(),
            "wall_s": self.wall_s,
            "busy_s": self.busy_s,
        }
        self._unsaved = arrays, meta

    def _save(self) -> None:
        """Save the newest mark as the checkpoint, unless it is saved already."""
        if self._unsaved is not None:
            self.folder.flush()
            checkpoint.save(self.folder.checkpoint, *self._unsaved)
            self._unsaved = None

    def _restore(self, world: World) -> None:
        found = checkpoint.load(self.folder.checkpoint)
        if found is None:
            self.folder.truncate(0)
            return
        arrays, meta = found
        if meta.get("kind") != CHECKPOINT:
            raise ShoalError(f"{self.folder.checkpoint} is a checkpoint of another kind ({meta.get('kind')!r}).")
        try:
            world.server = ServerState.from_parts(arrays, meta["server"], world.server.space)
        except ValueError as error:
            text = "the checkpoint belongs to another model or adapter"
            raise ConfigError("adapter", world.server.layout.hash, text) from error
        world.clock = Clock(meta["clock"])
        world.fleet.restore(meta["fleet"])
        world.downlink.restore(arrays, meta["downlink"])
        if not self.experiment.settings.engine.remote:
            self.experiment.node.restore(arrays)
        self.ledger = Ledger.restore(meta["ledger"])
        world.guard.restore(meta["privacy"])
        world.kept = None if meta["schedule"] is None else (arrays, meta["schedule"])
        self._tested, self._asked, self._tested_at, self._seen = meta["tested"]
        self.newest = meta["newest"]
        self.busy_s, self._before_s = meta["busy_s"], meta["wall_s"]
        self.folder.truncate(meta["metrics_offset"])
        self.restored = True

    def final(self) -> dict[str, Any]:
        """The numbers of run.json, from the newest evaluation and the ledger."""
        assert self.world is not None
        totals = self.ledger.final()
        seconds = max(self.busy_s, 1e-9)
        scores: Mapping[str, Any] = {k: v for k, v in self.newest.items() if k != "examples"}
        return {
            **scores,
            "rounds": self.world.server.round,
            "bytes_up": totals["bytes_up"],
            "bytes_down": totals["bytes_down"],
            "virtual_s": self.world.clock.now_s,
            "wall_s": round(self.wall_s, 3),
            "client_steps": totals["client_steps"],
            "client_steps_per_s": totals["client_steps"] / seconds,
            # Where tokens are kept secret none are counted.
            "tokens_per_s": totals["tokens"] / seconds if totals["tokens"] else None,
            "rejected_updates": totals["rejected_updates"],
            "rejected": totals["rejected"],
            "epsilon": self.world.guard.epsilon,
            "stopped": self.stopped,
        }


def _spread(name: str, values: Sequence[float | None]) -> Event:
    """How the metric ``name`` is spread over ``values``, as an evaluation's event has it."""
    mean, std, worst = metrics.spread(values, higher_is_better=name == "accuracy")
    return {"metric": name, "mean": mean, "std": std, "worst_decile": worst}
