"""Gradient coding: full gradients from workers with the same data, of which the slow need not be waited for.

Job t is one step of gradient descent of model ``(t - 1) mod M``, on the mean loss over all samples::

    x' = server optimiser(x, -lr g),     g = sum over chunks C of g_C

and M >= T + 1 independent models are trained in turn, since a job is over only T rounds after the one that it began
in. In every round each worker answers with coded sums of chunks' gradients at jobs' states (`fl.coding.schemes`), and
the master ends the round by its wait rule (`fl.coding.wait`). Krishnan et al., arXiv 2211.13802.

Model 0 is the run's: it is evaluated and saved. Model m > 0 starts from Gaussian draws with the standard deviation of
each of model 0's tensors, so a tensor of zeros is that in all of them.

Workers are clients that hold the same data (``partition=replicated``): any of them may be asked for any chunk. With
data of clients' own there is nothing to recompute elsewhere, and this schedule refuses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aggregators.fedavg import FedAvg
from aggregators.staleness import Constant
from clients.behaviours.none import Honest
from clients.data.partition import Replicated
from clients.local.training import LocalTraining
from fl.coding.jobs import Jobs
from fl.coding.schemes import GC, MSGC, SRSGC, Scheme
from fl.coding.wait import WAITING
from fl.config import setting
from fl.errors import ConfigError, ShoalError
from fl.network import WallClock
from fl.sampling import Fixed
from fl.schedules.base import Event, Schedule, World, demand
from privacy.none import NoPrivacy


@dataclass(frozen=True)
class GradientCoding(Schedule):
    """Steps of gradient descent on coded gradients; ``rounds`` counts the steps of all models."""

    rounds: int = setting(10, ge=1, help="jobs: full-gradient steps, of all models together")
    scheme: str = setting(
        "m_sgc", choices=["uncoded", "gc", "sr_sgc", "m_sgc"], help="who computes what, and when again"
    )
    tolerated: int = setting(
        1, ge=0, help="late workers that are tolerated: in a round (gc), distinct ones in a window (sr_sgc, m_sgc)"
    )
    burst: int = setting(1, ge=1, help="B: rounds of a window in which a worker may be late (sr_sgc, m_sgc)")
    window: int = setting(2, ge=1, help="W: rounds of a window (sr_sgc, m_sgc)")
    code: str = setting(
        "auto", choices=["auto", "cyclic", "fractional"], help="auto: fractional repetition where it is possible"
    )
    mu: float = setting(0.2, ge=0, le=1e3, help="a worker is late after (1 + mu) times the fastest one's time")
    waiting: str = setting(
        "longer", choices=list(WAITING), help="where the model of lateness would break: wait longer, or for all"
    )
    models: int | None = setting(None, ge=1, help="models trained in turn; null: as few as the scheme's delay allows")

    def make(self, number: int, seed: int) -> Scheme:
        """The scheme for ``number`` workers. Raises `ConfigError`."""
        lam, jobs = self.tolerated, self.rounds
        try:
            if self.scheme == "uncoded":
                return GC(number, jobs, 0)
            if self.scheme == "gc":
                return GC(number, jobs, lam, self.code, seed)
            kind = SRSGC if self.scheme == "sr_sgc" else MSGC
            return kind(number, jobs, self.burst, self.window, lam, self.code, seed)
        except ShoalError as error:
            shown = f"{self.scheme} (tolerated {lam}, burst {self.burst}, window {self.window})"
            raise ConfigError("schedule.scheme", shown, "what can be built", str(error)) from error

    def check(self, settings: Any) -> None:
        need = demand("with schedule=gradient_coding")
        s = settings
        copies = (
            "replicated, since workers compute each other's shares: private data are never copied to other clients,"
        )
        need("partition", s.partition, isinstance(s.partition, Replicated), copies)
        need("privacy", s.privacy, isinstance(s.privacy, NoPrivacy), "none: a coded sum has no clipped examples")
        need(
            "secure_aggregation", s.secure_aggregation, not s.secure_aggregation.active, "none: late sums are left out"
        )
        need("attack", s.attack, isinstance(s.attack, Honest), "none: one wrong answer spoils a decoded sum")
        fraction = s.data.client_test_fraction
        need("data.client_test_fraction", fraction, fraction == 0, "0: all workers hold the same samples")
        plain = isinstance(s.sampling, Fixed) and not s.sampling.over_selection
        need("sampling", s.sampling, plain, "fixed with over_selection=0: all workers work in every round")
        planned = not isinstance(s.network, WallClock)
        need("network", s.network, planned, "a model of time: rounds end by times that are planned,")
        few = s.clients.per_round
        need("clients.per_round", few, few in (None, s.clients.number), "null: all workers work in every round")
        need("aggregator", s.aggregator, type(s.aggregator) is FedAvg, "fedavg: there is one gradient, and no mean")
        fresh = type(self.rule(s.aggregator.staleness)) is Constant
        need("aggregator.staleness", s.aggregator.staleness, fresh, "auto: no gradient is stale")
        need(
            "local", s.local, type(s.local) is LocalTraining, "a plain one: a worker sends gradients, and takes no step"
        )
        need("local.clip_norm", s.local.clip_norm, s.local.clip_norm is None, "null")
        one = not s.adapter.mixed_ranks and s.adapter.form not in ("alternating", "gated")
        need("adapter", s.adapter, one, "one whose tensors train in every round, of one rank")
        start = s.adapter.initialisation
        need("adapter/init", start, start is None, "default: no start that is made from data or changes the base")
        error = s.evaluation.aggregation_error
        need("evaluation.aggregation_error", error, not error, "false")
        if s.clients.number is not None:
            delay = self.make(s.clients.number, s.seed).delay
            allowed = f"at least {delay + 1}: a job is over {delay} rounds after the one that it began in"
            need("schedule.models", self.models, (self.models or delay + 1) > delay, allowed)

    def run(self, world: World) -> Iterator[Event]:
        coded = Jobs(self, world, self.make(world.number, world.seed))
        delay = coded.scheme.delay
        if world.kept is not None:
            coded.restore(*world.kept)
        world.keep = coded.parts
        first = world.server.round + delay + 1 if world.server.round else 1
        for number in range(first, self.rounds + delay + 1):
            yield from coded.round(number)
            if number > delay:
                yield coded.step(number - delay)
