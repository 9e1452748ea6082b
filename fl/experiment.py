"""From settings to the objects of one run: data dealt out, adapter attached, work laid on the machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from aggregators.base import Aggregator, ServerOptimizer
from aggregators.combining import ROOT, Combining
from clients import tuning
from clients.adapters.base import Adapter
from clients.adapters.base_change import Change
from clients.adapters.initial.base import DataDriven
from clients.behaviours.base import Behaviour
from clients.behaviours.none import Honest
from clients.cohort import Cohort
from clients.data.at_nodes import AtNodes, held
from clients.data.federated import FederatedData, federate
from clients.data.partition import Partition, Replicated
from clients.data.source import Source
from clients.data.tokens import TokenData
from clients.local.private import Private
from clients.local.training import LocalTraining, Work
from clients.models import Base, ModelSpec
from clients.prefix import PrefixCache, first_adapted_layer
from clients.trainer import Plan, Trainer
from clients.worker import Worker
from fl.config import build, setting
from fl.engine.home import Charges, Samples, at_server
from fl.engine.settings import Engine
from fl.errors import ConfigError
from fl.evaluation import Evaluation, numbers
from fl.network import Network
from fl.node import Node
from fl.sampling import Sampling
from fl.schedules.base import Schedule
from fl.secure import Codecs, SecureClients, make_codecs
from fl.shares import SharedClients
from fl.state import ServerState, Update
from fl.topology.auto import Auto, resolve
from fl.topology.base import Topology
from fl.trackers.base import Tracker
from fl.transport.base import PeerTransport
from privacy import example_level
from privacy.base import Guard, Privacy, noise_root
from privacy.secure_aggregation.settings import SecAggPlus, SecureAggregation
from privacy.secure_aggregation.shares import SecretShares

# The base and its head start from the same draws in every run; the adapter's own draws are the run's seed's.
BASE_SEED = 0
# Activations of frozen layers are kept up to this many bytes unless asked for.
PREFIX_LIMIT = 2 << 30
# Methods whose output is no fixed change of the base's weights.
UNMERGEABLE = ("LILY", "SHADOW")


@dataclass(frozen=True)
class Clients:
    """How many data holders there are, and how many of them a round asks (null: all)."""

    number: int | None = setting(10, ge=1, help="clients; null: as many as the partition finds (natural)")
    per_round: int | None = setting(None, ge=1, help="clients that a round asks; null: all")


@dataclass(frozen=True)
class Saving:
    """What a run leaves: a PEFT adapter, or the whole model with the weight change merged into it."""

    form: str = setting("adapter", choices=["adapter", "merged"], help="a PEFT adapter, or the whole model")
    rank: int | None = setting(None, ge=1, help="save the change's best approximation of that rank; null: all of it")

    def check(self, adapter: Adapter) -> None:
        """Raise `ConfigError` where ``adapter`` can't be saved so."""
        if self.rank is not None and adapter.form == "other":
            raise ConfigError("saving.rank", self.rank, "null: this adapter's change is no product of factors to cut")
        method = str(getattr(adapter, "method", "")).upper()
        if self.form == "merged" and method in UNMERGEABLE:
            raise ConfigError("saving.form", "merged", f"adapter: PEFT can't merge {method}")


@dataclass(frozen=True)
class Settings:
    """One experiment: every group's choice, checked. Built by `fl.config.build` from the composed configuration."""

    model: ModelSpec
    data: Source
    partition: Partition
    adapter: Adapter
    local: LocalTraining
    sampling: Sampling
    schedule: Schedule
    topology: Topology
    network: Network
    aggregator: Aggregator
    server_optimizer: ServerOptimizer
    engine: Engine
    privacy: Privacy
    secure_aggregation: SecureAggregation
    attack: Behaviour
    evaluation: Evaluation
    tracker: Tracker
    clients: Clients
    saving: Saving
    name: str = setting("run", help="names the run's folder")
    seed: int = setting(0, ge=0, help="every random draw comes from it")
    checkpoint_every: int = setting(1, ge=1, help="rounds between checkpoints")
    report: bool = setting(True, help="write report.html and the plots")

    @classmethod
    def of(cls, resolved: Mapping[str, Any]) -> Settings:
        """Check the composed configuration. Raises `ConfigError`."""
        settings: Settings = build(resolved, "", cls)
        if not settings.name or any(c in settings.name for c in "/\\\0") or settings.name.startswith("."):
            raise ConfigError("name", settings.name, "a name that can be a folder's")
        number, per_round = settings.clients.number, settings.clients.per_round
        if number is not None and per_round is not None and per_round > number:
            raise ConfigError("clients.per_round", per_round, f"at most clients.number, which is {number}")
        if number is not None:
            settings.network.check(number)
            settings.aggregator.check_clients(number)
            settings.check_numbers(number)
        settings.aggregator.check(settings.adapter, settings.server_optimizer)
        if not settings.schedule.decentral and not isinstance(settings.topology, Auto):
            allowed = f"auto under {type(settings.schedule).__name__}, which has a server"
            raise ConfigError(
                "topology", settings.topology.name, allowed, "Choose a schedule of peers: schedule=dpsgd."
            )
        if isinstance(settings.aggregator, Combining) and settings.aggregator.combine.root:
            name = type(settings.aggregator.combine).__name__
            if not settings.data.public:
                allowed = f"at least 1 with {name}: the server trains on public samples of its own"
                raise ConfigError("data.public", 0, allowed, "Try data.public=100.")
            if settings.attack.needs_rule:
                allowed = f"false with {name}: attackers don't know the server's own update"
                raise ConfigError("attack.optimise", True, allowed)
            if not settings.schedule.in_rounds:
                allowed = f"synchronous with {name}: the server's own update is that of a round"
                raise ConfigError("schedule", type(settings.schedule).__name__, allowed)
        settings.attack.check(settings)
        settings.engine.check(settings)
        settings.schedule.check(settings)
        settings.schedule.rule(settings.aggregator.staleness).check(settings)
        settings.secure_aggregation.check(settings)
        if settings.privacy.in_rounds and not settings.schedule.in_rounds:
            name = type(settings.privacy).__name__
            allowed = f"synchronous with privacy={name}: its claim is about rounds in which a client has one update"
            way_out = "Use privacy=dp_sgd or privacy=local, whose claims are about each client's own jobs."
            raise ConfigError("schedule", type(settings.schedule).__name__, allowed, way_out)
        if settings.privacy.unit is not None and isinstance(settings.partition, Replicated):
            allowed = "one that deals samples out, with a privacy mechanism: what all hold is nobody's own"
            raise ConfigError("partition", "Replicated", allowed, "Use privacy=none.")
        settings.privacy.check(settings)
        settings.local.check(settings.adapter)
        settings.saving.check(settings.adapter)
        if settings.model.zero_head and not settings.adapter.train_head:
            allowed = "true: a head that starts at zero and stays there passes no gradient on"
            raise ConfigError("adapter.train_head", False, allowed, "Or give it weights: model.head_std=0.02.")
        start = settings.adapter.initialisation
        if settings.model.zero_head and start is not None and start.statistic == "gradient":
            allowed = f"above 0: {type(start).__name__} starts from a gradient, and a head of zeros passes none on"
            raise ConfigError("model.head_std", 0.0, allowed, "Try model.head_std=0.02.")
        settings.adapter.config(settings.adapter.target_modules or settings.model.target_modules)
        if not settings.engine.remote:  # else it is the device of other machines
            tuning.pick_device(settings.engine.device)
        settings.tracker.check()
        return settings

    @property
    def graph(self) -> Topology:
        """Who hears whom, under a schedule of peers."""
        return resolve(self.topology, self.schedule.graph)

    def check_numbers(self, clients: int) -> None:
        """Raise `ConfigError` where ``clients`` are too few for what is done with them."""
        if self.schedule.decentral:
            self.graph.check(clients)
            if len(self.attack.affected(clients, self.seed)) == clients:
                way_out = "Lower attack.fraction, or name fewer attack.clients."
                raise ConfigError("attack", type(self.attack).__name__, "one that leaves a peer honest", way_out)
        else:
            self.aggregator.check_round(self.clients.per_round or clients)


@dataclass
class Shared:
    """What runs of one process share: tokenised sets and loaded base models, each under its content's name.

    A run that adapts a base works on a structural copy, whose frozen tensors are the shared ones.
    """

    tokens: dict[str, tuple[TokenData, TokenData]] = field(default_factory=dict)
    bases: dict[tuple, Base] = field(default_factory=dict)
    prefixes: dict[tuple, dict[str, torch.Tensor]] = field(default_factory=dict)

    def prefix(
        self, settings: Settings, plan: Plan, cut: int, sets: Mapping[str, TokenData]
    ) -> dict[str, torch.Tensor]:
        """The hidden states that enter layer ``cut``, by set; empty until a run has computed them. One choice's."""
        held = tuple((name, data.fingerprint) for name, data in sets.items())
        key = (held, settings.model.fingerprint(), plan.dtype, plan.attention, plan.device, cut)
        if key not in self.prefixes:
            self.prefixes = {key: {}}
        return self.prefixes[key]

    def data(self, settings: Settings) -> tuple[TokenData, TokenData]:
        key = f"{settings.data!r} {settings.model.fingerprint()}"
        if key not in self.tokens:
            self.tokens[key] = settings.data.load(settings.model)
        return self.tokens[key]

    def base(self, spec: ModelSpec, labels: int | None, dtype: torch.dtype, attention: str, device: str) -> Base:
        """A fresh structural copy of the base: adapting it leaves the shared one as it is."""
        key = (spec.fingerprint(), labels, dtype, attention, device)
        if key not in self.bases:
            while len(self.bases) >= 4:  # measuring loads one of each kind; memory is for the one that is used
                self.bases.pop(next(iter(self.bases)))
            self.bases[key] = spec.load(labels, BASE_SEED, dtype=dtype, attention=attention, device=device)
        base = self.bases[key]
        tensors = {id(t): t for t in (*base.module.parameters(), *base.module.buffers())}
        module: nn.Module = copy.deepcopy(base.module, tensors)
        return Base(module, base.tokenizer, base.task, base.head, base.name, base.fingerprint)


class Experiment:
    """One run's data, adapter and node, made when they are first needed. Close it when done.

    ``hosted`` is how many clients train here, where not all do.
    """

    def __init__(
        self,
        settings: Settings,
        shared: Shared | None = None,
        note: Callable[[str], None] = lambda _: None,
        hosted: int | None = None,
    ):
        self.settings, self.shared, self.note, self.hosted = settings, shared or Shared(), note, hosted
        self.told: dict[
            int, tuple[int, int]
        ] = {}  # at the server: samples (train, test) that clients have of their own
        self.samples: Samples | None = None  # at a node: what its clients have of their own
        self.secret: bytes | None = None  # of this place and run, that noise is keyed with
        self.transport: PeerTransport | None = None  # at a node: its way to other nodes' peers
        self.charges: Charges | None = None  # at the server: what clients elsewhere may have spent
        self._trainer: Trainer | None = None
        self.plan: Plan | None = None

    @cached_property
    def data(self) -> FederatedData:
        """The federated data; checks the settings that depend on it."""
        s = self.settings
        if self.samples is not None:
            return self.samples.federated()
        train, test = self.shared.data(s)
        if isinstance(s.partition, AtNodes):
            return at_server(s, train, test, self.told)
        data = federate(train, test, s.partition, s.clients.number, s.seed, s.data.client_test_fraction, s.data.public)
        if s.clients.per_round is not None and s.clients.per_round > len(data):
            raise ConfigError("clients.per_round", s.clients.per_round, f"at most the {len(data)} clients there are")
        s.network.check(len(data))
        s.aggregator.check_clients(len(data))
        s.check_numbers(len(data))
        affected = s.attack.affected(len(data), s.seed)
        poison = s.attack.poison(data.train, data.test, data.parts, affected, s.seed)
        return data if poison is None else replace(data, train=poison.train, poison=poison)

    @property
    def tests(self) -> dict[str, TokenData]:
        """What `central` evaluates on, by name: the central test set, and that of a backdoor's trigger."""
        poison = self.data.poison
        if poison is None or poison.triggered is None:
            return {"test": self.data.test}
        return {"test": self.data.test, "triggered": poison.triggered}

    @property
    def per_round(self) -> int:
        return self.settings.clients.per_round or len(self.data)

    @property
    def num_labels(self) -> int | None:
        return len(self.data.train.label_names) if self.settings.model.task == "classification" else None

    def cohort(self, dtype: torch.dtype, attention: str, device: str) -> Cohort:
        """A fresh cohort over the shared base."""
        s = self.settings
        base = self.shared.base(s.model, self.num_labels, dtype, attention, device)
        model = s.adapter.attach(base, s.model.target_modules, s.seed)
        return Cohort(model, base.task, device, s.adapter.space(model))

    def central(self, trainer: Trainer, vector: np.ndarray, base: Change) -> dict[str, Any]:
        """Loss and metrics of the state ``vector`` ``(d,)`` beside the changed base on the central test set."""
        test = self.data.test
        scores = trainer.evaluate(vector, "test", np.arange(len(test)), self.settings.evaluation.batch_size, base)
        found = {"examples": len(test), **numbers(scores, test.labels if self.num_labels else None)}
        poison = self.data.poison
        if poison is not None and poison.triggered is not None:
            every = np.arange(len(poison.triggered))
            said = trainer.evaluate(vector, "triggered", every, self.settings.evaluation.batch_size, base).predicted
            found["attack_success"] = float(np.mean(said == poison.target))
        return found

    def choose_plan(self) -> Plan:
        """Measure, or look up, how to lay the work on the machine."""
        s = self.settings
        parts = sorted(held(self.data.parts), key=len, reverse=True) or [np.arange(len(self.data.train))]
        typical = [s.local.batches(s.seed, c, 0, part)[0] for c, part in enumerate(parts[: min(16, self.per_round)])]
        private = None
        if s.privacy.unit == "example":
            clipping = getattr(s.privacy, "clipping", "flat")
            private = Private(1.0, 1.0, s.local.batch_size, ("probe",), clipping)
        probe = tuning.Probe(
            self.cohort, [self.data.train.batch(b) for b in typical], s.local.optimizer, s.local.accumulation, private
        )
        shape = [s.model.fingerprint(), s.adapter, s.local.batch_size, s.local.accumulation, s.data.max_length]
        jobs = min(self.per_round, self.hosted or self.per_round)
        self.plan = tuning.choose(s.engine, probe, jobs, [*shape, s.local.optimizer, private], self.note)
        return self.plan

    @cached_property
    def trainer(self) -> Trainer:
        """The trainer under the chosen plan; owns worker processes, so `close` it."""
        plan = self.plan or self.choose_plan()
        cohort = self.cohort(plan.torch_dtype, plan.attention, plan.device)
        sets = {"train": self.data.train, **self.tests}
        worker = Worker(cohort, sets, self.settings.local, self.settings.seed, self._prefix(cohort, sets))
        self._trainer = Trainer(worker, plan, self.settings.engine.forks)
        return self._trainer

    def _prefix(self, cohort: Cohort, sets: Mapping[str, TokenData]) -> PrefixCache | None:
        wanted = self.settings.model.prefix_cache
        possible = not cohort.has_dropout and first_adapted_layer(cohort)[0] is not None
        if wanted == "always" and not possible:
            reason = "dropout is on" if cohort.has_dropout else "no layer lies below the first adapter"
            raise ConfigError("model.prefix_cache", wanted, f"not possible here: {reason}", "Use auto or never.")
        if wanted == "never" or not possible:
            return None
        cache = PrefixCache(cohort, sets)
        size = cache.bytes_needed()
        if wanted == "auto" and size > PREFIX_LIMIT:
            cache.remove()
            return None
        assert self.plan is not None
        known = self.shared.prefix(self.settings, self.plan, cache.cut, sets)
        if not known:
            self.note(f"Computing the {cache.cut} frozen layers below the first adapter once ({size / 1e6:.0f} MB) ...")
        cache.fill(known)
        return cache

    @cached_property
    def node(self) -> Node:
        """The node that holds all clients."""
        s = self.settings
        init = s.adapter.initialisation
        asked = init if isinstance(init, DataDriven) else None
        space = self.trainer.worker.cohort.space
        secure: SecureClients | SharedClients | None = None
        if isinstance(s.secure_aggregation, SecretShares):
            secure = SharedClients(s.secure_aggregation, s.seed, self.codecs)
        elif isinstance(s.secure_aggregation, SecAggPlus):
            weighted = s.aggregator.weights == "examples"
            root = self.guard.keyed(noise_root(s))
            secure = SecureClients(s.secure_aggregation, s.seed, self.codecs, weighted, root)
        # Among peers, what hostile ones send each other is another thing than what they learn.
        attack = Honest() if s.schedule.decentral and s.attack.crafts else s.attack
        part, rule = s.schedule.part(self), self._defence if s.attack.needs_rule else None
        return Node(self.trainer, self.data, s.local, attack, s.seed, space, self.guard, asked, secure, part, rule)

    def _defence(self, rows: np.ndarray) -> np.ndarray:
        """What the server makes of updates ``(n, d)``: known to attackers that search against it."""
        rule = self.settings.aggregator
        assert isinstance(rule, Combining)
        return rule.of_rows(rows)

    def root_update(self, server: ServerState, round: int, lr: float) -> Update:
        """The server's own update, of training on its public samples as a client would (FLTrust)."""
        s, space = self.settings, server.space
        groups = space.trains(round)
        whole = len(space.columns(groups)) == space.layout.size
        batches = s.local.batches(s.seed, ROOT, round, self.data.public)
        work = Work(ROOT, round, server.vector, batches, lr, {}, None if whole else groups, server.base)
        fit = self.trainer.train([work])[0]
        columns = None if whole else space.columns(groups)
        start = server.vector if columns is None else server.vector[columns]
        return Update(ROOT, round, server.version, fit.state - start, len(self.data.public), columns=columns)

    @cached_property
    def codecs(self) -> Codecs:
        """How updates are encoded for secure sums: both halves, client and server, must agree."""
        s, space = self.settings, self.trainer.worker.cohort.space
        weight = len(self.data.train) if s.aggregator.weights == "examples" else 1
        clients = min(len(self.data), s.sampling.asked(self.per_round))
        return make_codecs(s.secure_aggregation, self.guard, space, clients, weight)

    @cached_property
    def guard(self) -> Guard:
        """What keeps the privacy claim: the client half acts in `node`, the server half in the schedule."""
        sizes = [len(part) for part in self.data.parts]
        if self.settings.privacy.unit == "example":
            example_level.check_disjoint(self.data.parts)
        guard = self.settings.privacy.guard(self.settings, sizes, self.trainer.worker.cohort.space)
        if self.secret is not None:
            guard.own(self.secret)
        return guard

    def close(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
