"""The ``secure_aggregation=`` group: whether the server sees clients' updates, or only sums of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fl.config import setting
from fl.errors import ConfigError
from fl.sampling import Poisson
from privacy.example_level import check_start
from privacy.secure_aggregation.codec import Codec, Fixed
from privacy.secure_aggregation.graph import Topology

if TYPE_CHECKING:
    from fl.experiment import Settings


@dataclass(frozen=True)
class SecureAggregation:
    """No secure aggregation: the server is sent every update in the clear."""

    active: ClassVar[bool] = False

    def check(self, settings: Settings) -> None:
        """Raise `ConfigError`, before anything loads, for what can't be done on sums alone."""

    def check_sums(self, settings: Settings, name: str) -> None:
        """What no form of sums, called ``name`` by users, can do: rules, ranks or records of single updates."""
        rule = type(settings.aggregator).__name__
        if not settings.aggregator.linear:
            raise ConfigError(
                "secure_aggregation", name, f"with a rule of the mean update alone, which {rule} is not",
                "Use aggregator=fedavg, fedsb, fedsvd or rolora.",
            )  # fmt: skip
        if settings.adapter.mixed_ranks:
            allowed = f"one rank for all clients with secure_aggregation={name}: sums are over equal columns"
            raise ConfigError("adapter.rank", getattr(settings.adapter, "rank", None), allowed)
        if not settings.schedule.in_rounds:
            allowed = f"a schedule in rounds, with secure_aggregation={name}: a sum is over clients asked together"
            raise ConfigError("schedule", type(settings.schedule).__name__, allowed, "Use schedule=synchronous.")
        if settings.evaluation.aggregation_error:
            allowed = f"false with secure_aggregation={name}: single updates are not known"
            raise ConfigError("evaluation.aggregation_error", True, allowed)
        check_start(settings.adapter.initialisation, "private")  # its statistics are sent in the clear

    def statement(self) -> str:
        """A sentence for the run's records; empty where there is nothing to say."""
        return ""


@dataclass(frozen=True)
class SecAggPlus(SecureAggregation):
    """SecAgg+ (`privacy.secure_aggregation.protocol`): the server learns the sum over the clients that answer.

    ``clip`` bounds every coordinate of an update; a client whose update leaves that range does not take part in the
    round, since its numbers would wrap around. ``scale`` is the integers per unit (null: the finest that fits).
    """

    active: ClassVar[bool] = True

    colluding: float = setting(0.1, ge=0, lt=1, help="fraction of the clients that may collude with the server")
    dropout: float = setting(0.1, ge=0, lt=1, help="fraction of the clients that may drop out in a round")
    security_bits: float = setting(40.0, gt=0, help="a sum shows more than it should with probability 2^-this")
    correctness_bits: float = setting(20.0, gt=0, help="a round is lost to dropouts with probability 2^-this")
    complete_up_to: int = setting(32, ge=0, help="up to this many clients everybody is everybody's neighbour")
    clip: float = setting(4.0, gt=0, help="largest absolute value of a coordinate of an update")
    modulus_bits: int = setting(32, choices=(32, 64), help="bits that a coordinate takes in a message")
    scale: float | None = setting(None, gt=0, help="integers per unit; null: the finest that can't wrap around")

    @property
    def topology(self) -> Topology:
        return Topology(self.colluding, self.dropout, self.security_bits, self.correctness_bits, self.complete_up_to)

    def codec(self, size: int, clients: int, max_weight: int) -> Codec:
        """The codec for updates of ``size`` numbers of at most ``clients`` clients."""
        return Fixed(size, self.clip, clients, max_weight, self.modulus_bits, self.scale)

    def check(self, settings: Settings) -> None:
        self.check_sums(settings, "secagg")
        if not isinstance(settings.aggregator.weights, str):
            allowed = "examples or uniform with secure_aggregation=secagg, where weights are integers"
            raise ConfigError("aggregator.weights", settings.aggregator.weights, allowed)
        self._check_sampling(settings)

    def _check_sampling(self, settings: Settings) -> None:
        sampling = settings.sampling
        if isinstance(sampling, Poisson):
            allowed = "fixed or available with secure_aggregation=secagg, which plans for a known number of clients"
            raise ConfigError("sampling", "poisson", allowed)
        late = sampling.over_selection / (1 + sampling.over_selection)
        if late > self.dropout:
            raise ConfigError(
                "sampling.over_selection", sampling.over_selection,
                f"at most what secure_aggregation.dropout={self.dropout:g} allows: those who are not among the first "
                f"drop out, which are {late:.0%} of the clients asked",
                f"Set secure_aggregation.dropout={math.ceil(late * 100) / 100:g} or more.",
            )  # fmt: skip
        number, per_round = settings.clients.number, settings.clients.per_round
        if per_round is None and number is None:
            return
        asked = sampling.asked(per_round or number or 0)
        try:
            self.topology.plan(asked if number is None else min(number, asked))
        except ConfigError as error:
            key = "clients.number" if per_round is None else "clients.per_round"
            way_out = "Use more clients, or a smaller secure_aggregation.colluding or dropout."
            raise ConfigError(key, per_round or number, error.allowed, way_out) from error

    def statement(self) -> str:
        t = self.topology
        return (
            "Secure aggregation (SecAgg+): of the updates the server saw sums over the clients of a round, never a "
            f"single one, if it keeps to the protocol and at most {t.colluding:.0%} of the clients collude with it. "
            "What a sum shows is shown. It also saw who took part when, each client's number of local steps (with "
            "local.epochs that tells how many examples it has, to within a batch), and evaluations on clients' own "
            "held-out examples."
        )
