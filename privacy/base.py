"""What a privacy mechanism promises (`Privacy`, `Statement`) and how it is kept while a run goes on (`Guard`).

A mechanism acts at four places, and nowhere else:

* before anything loads, `Privacy.check` refuses settings that it can't account for;
* at the data holder, `Guard.job` decides how a job samples, clips and noises, or refuses it, and `Guard.release` is
  the last thing that touches a reply;
* at the server, `Guard.collect` turns the accepted updates into those that an aggregation rule sees;
* `Guard.books` count what has really been spent; they are in the checkpoint, and the statement is made from them.

Across hosts each place has a guard of its own. A node's keeps its clients' books (`Guard.client_state`) and draws from
a secret of the node (`Guard.own`); the server's charges what it asks for (`Guard.mirror`), so its statement is an upper
bound of what nodes have spent.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from clients.behaviours.base import ReplyFields
from clients.local.private import Private
from fl.errors import ConfigError, ShoalError
from fl.keys import key_bytes
from fl.state import ServerState, Update
from privacy.secure_aggregation.codec import Codec

if TYPE_CHECKING:
    from clients.adapters.space import Space
    from fl.experiment import Settings


Root = TypeVar("Root", int, str)

NOISE_PARTS = (
    "seed", "model", "data", "partition", "adapter", "local", "sampling", "schedule", "network", "aggregator",
    "server_optimizer", "privacy", "attack", "clients",
)  # fmt: skip


def noise_root(settings: Any) -> str:
    """What the keys of a run's noise begin with: a name of its seed and of all settings that its releases depend on.

    Runs of a sweep share a seed. If they shared their noise as well, the difference of two of them, of two learning
    rates or two noise multipliers say, would hold data without noise.
    """
    parts = {name: getattr(settings, name, None) for name in NOISE_PARTS}
    plain = {n: repr(v) for n, v in parts.items() if v is None or is_dataclass(v) or isinstance(v, int | float | str)}
    return key_bytes("noise", json.dumps(plain)).hex()[:32]


class BudgetSpent(ShoalError):
    """A client's next step would exceed its budget: it takes part no more. Others go on."""


@dataclass(frozen=True)
class Job:
    """How a private job goes: the examples of each step (a batch may be empty) and what its gradients pass."""

    batches: list[np.ndarray]
    private: Private


@dataclass(frozen=True)
class Statement:
    """A privacy claim, whole: no number of it means anything without the others.

    ``epsilon`` is what has been spent (the largest of all holders; None: no finite bound), ``target`` what may be
    spent; ``holders`` has a row for each group of holders that are alike. ``against`` says who is assumed to see what,
    ``uncovered`` what the claim does not cover, ``also`` what other ways of counting would print, and why not.
    """

    mechanism: str
    unit: str | None = None
    relation: str | None = None
    sampling: str | None = None
    clipping: str | None = None
    noise: str | None = None
    participation: str | None = None
    accountant: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    target: float | None = None
    against: str = ""
    uncovered: list[str] = field(default_factory=list)
    holders: list[dict[str, Any]] = field(default_factory=list)
    also: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The claim in sentences, for run.json and the model card."""
        parts = [self.mechanism.rstrip(".") + "."]
        if self.unit is not None and self.epsilon is not None and self.delta is not None:
            target = "" if self.target is None else f" of a budget of {self.target:g}"
            parts.append(
                f"({self.epsilon:.4g}, {self.delta:.3g})-differential privacy was spent{target}, for one {self.unit}, "
                f"neighbours by {self.relation}, by the {self.accountant} accountant."
            )
        elif self.unit is not None:
            parts.append(f"No finite epsilon, for one {self.unit}.")
        named = (
            ("Sampling", self.sampling),
            ("Clipping", self.clipping),
            ("Noise", self.noise),
            ("Participation", self.participation),
            ("Holds against", self.against),
            ("Not covered", "; ".join(self.uncovered)),
            ("Counted otherwise", "; ".join(self.also)),
        )
        parts += [f"{name}: {value}." for name, value in named if value]
        return " ".join(parts)

    def headline(self) -> str:
        """One line for a terminal: what bounds which unit, and where the rest is."""
        if self.unit is None:
            return f"{self.mechanism.partition(':')[0]}; see run.json"
        if self.target is not None:
            bound = f"epsilon <= {self.target:g}"
        else:
            bound = "no finite epsilon" if self.epsilon is None else "epsilon as it is spent"
        how = [] if self.delta is None else [f"delta <= {self.delta:.2g}"]
        how += [self.accountant] if self.accountant else []
        shown = f" ({', '.join(how)})" if how else ""
        return f"{self.mechanism}: {bound} for one {self.unit}{shown}; see run.json"

    def as_plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def check_target(epsilon: float | None, noise_multiplier: float | None, example: float = 1) -> None:
    """Raise `ConfigError` where neither a target nor the noise is given; ``example`` is a noise to suggest."""
    if epsilon is None and noise_multiplier is None:
        way_out = f"Give one: privacy.epsilon=3, or privacy.noise_multiplier={example:g}."
        raise ConfigError("privacy.epsilon", None, "a target, where privacy.noise_multiplier is null too", way_out)


class Guard:
    """The privacy of one run at work. This one promises nothing and changes nothing; mechanisms override.

    The client half (`job`, `release`) is called where the data are, the server half (`collect`) at the server; what
    both know is public. ``counts_secret`` says that how many clients answered is secret too: a round then goes on
    whatever their number. ``root`` is what the keys of its noise and of its batches begin with.
    """

    counts_secret: ClassVar[bool] = False
    root: str = ""
    secret: bytes | None = None

    def __init__(self, statement: Statement | None = None):
        self._statement = statement or Statement("No privacy mechanism")

    def own(self, secret: bytes) -> None:
        """From now on all that is drawn here is keyed by ``secret`` too, which only this place has.

        Without it noise comes from the run's seed, and whoever has the settings can compute it. The secret must be of
        this run alone: two runs that shared noise would show the difference of their data.
        """
        if self.secret is not None:
            raise ShoalError("a guard has one secret, and this one has its own already")
        self.secret = secret
        self.root = self.keyed(self.root)

    def keyed(self, root: Root) -> Root:
        """``root`` keyed by the secret, for draws beside this guard's own that the claim counts on; itself without."""
        if self.secret is None:
            return root
        key = key_bytes("own", root, self.secret.hex())[:16]
        return int.from_bytes(key, "little") if isinstance(root, int) else key.hex()

    def source(self, place: str) -> str:
        """What the noise that is drawn at ``place`` (node or server) comes from, in words."""
        return "the run's seed" if self.secret is None else f"the {place}'s own secret"

    def job(self, client: int, round: int, fingerprint: str, examples: np.ndarray, memory: dict) -> Job | None:
        """How ``client`` does its job of ``round`` on ``examples``; None: as its local algorithm would by itself.

        ``fingerprint`` names the request's content, so that a job that is delivered twice is the same job, and costs
        nothing more, and one with other content is another. ``memory`` is what the client keeps between jobs. Raises
        `BudgetSpent`.
        """
        return None

    def release(self, reply: ReplyFields, columns: np.ndarray) -> ReplyFields:
        """What may leave the client of an honest reply; ``columns`` of the layout are what its update covers."""
        return reply

    def broadcast(self, server: ServerState) -> dict[str, np.ndarray]:
        """What training requests carry beside the state: public arrays that clients need."""
        return {}

    def collect(self, server: ServerState, updates: Sequence[Update], round: int, lr: float) -> list[Update]:
        """What an aggregation rule is given of the accepted ``updates`` of ``round``."""
        return list(updates)

    def codec(self, size: int, round: int) -> Codec | None:
        """How updates of ``size`` numbers are summed under secure aggregation; None: in fixed point, without noise."""
        return None

    def stopped(self) -> str | None:
        """Why no further round may begin, or None."""
        return None

    @property
    def epsilon(self) -> float | None:
        """What has been spent so far: the largest of all holders. None where nothing is promised."""
        return self.statement().epsilon

    def statement(self) -> Statement:
        """The claim, as far as the run has come."""
        return self._statement

    def state(self) -> dict[str, Any]:
        """The books as plain values, for a checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo `state`. Raises `ConfigError` where the books are those of other settings."""

    def mirror(self, client: int, round: int, fingerprint: str, examples: int) -> None:
        """Charge here what ``client``, which has ``examples`` examples, may spend on a request that is sent to it.

        Its own book, at its node, never has more: a request that is lost, or refused there, is charged here all the
        same. ``fingerprint`` must differ wherever the node's does. Where books are kept here anyway, nothing.
        """

    def client_state(self, client: int) -> dict[str, Any]:
        """The book of ``client`` as plain values, where clients have books; else empty."""
        return {}

    def restore_client(self, client: int, state: dict[str, Any]) -> None:
        """Undo `client_state`; nothing for an empty one. Raises `ConfigError` for the book of other settings."""


@dataclass(frozen=True)
class Privacy(ABC):
    """A promise about privacy, or its absence; the settings are fields.

    ``unit`` is what the claim is about: an ``example``, a ``client`` (all that it holds), or None.
    """

    unit: ClassVar[str | None] = None
    in_rounds: ClassVar[bool] = False  # whether the claim counts on rounds (`fl.schedules.base.Schedule.in_rounds`)

    def check(self, settings: Settings) -> None:  # noqa: B027  (by default there is nothing to refuse)
        """Raise `ConfigError`, before anything loads, for settings that the claim can't account for."""

    @abstractmethod
    def guard(self, settings: Settings, sizes: Sequence[int], space: Space) -> Guard:
        """The guard of a run whose clients hold ``sizes`` training examples and train in ``space``.

        Plans and calibrates the noise. Raises `ConfigError` where the target can't be reached.
        """
