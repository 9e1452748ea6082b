"""What every initialisation is, and what one that looks at data promises about them.

A low-rank adapter changes a weight W0 ``(d, k)`` by ``s B A`` or ``s B R A``, with A ``(r, k)``, B ``(d, r)``,
R ``(r, r)``. An initialisation gives A, B and R of a module, and a change of the base where the start ``s B A`` is to
be taken back, so that training begins at W0 all the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fl.config import setting
from fl.errors import ConfigError, ShoalError

SOURCES = ("public", "client", "clients", "private")


@dataclass
class Site:
    """Where an adapter starts: one module.

    ``weight`` is W0 ``(d, k)``, (out, in) whatever the layer's own storage; ``statistic`` what the initialisation asks
    for (in float64, see `clients.adapters.statistics`) and ``count`` the samples summed in it, which only one that
    depends on the statistic's scale reads; ``scale`` is s; ``generator`` is on the CPU.
    """

    weight: Tensor
    statistic: Tensor | None
    rank: int
    scale: float
    generator: torch.Generator
    count: int = 1


@dataclass
class Start:
    """The tensors that an adapter of one module begins with, on the CPU, in float32 or the weight's wider precision.

    ``base`` is what is added to W0, factored as ``left @ right``; None where the base stays as it is.
    """

    a: Tensor  # (r, k)
    b: Tensor  # (d, r)
    core: Tensor | None = None  # (r, r), where the adapter has an R
    base: tuple[Tensor, Tensor] | None = None  # (d, p), (p, k)

    @classmethod
    def of(cls, weight: Tensor, a: Tensor, b: Tensor, core: Tensor | None = None, cancel: float | None = None) -> Start:
        """A start from float64 tensors. ``cancel`` is the scale s of a start whose ``s B A`` the base takes back."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
        # Of the rounded factors: the base takes back what the adapter really adds.
        base = None if cancel is None else (-cancel * b, a)
        return cls(a, b, None if core is None else core.to(dtype).contiguous(), base)


@dataclass(frozen=True)
class Initialisation(ABC):
    """Base of all initialisations.

    ``statistic`` names what of the data it needs: ``none``; ``gradient``, the sum over samples of d loss / d W
    ``(d, k)``; ``moment``, the sum over tokens of x x^T ``(k, k)``. ``form`` says which adapters can begin with it:
    ``ba`` (``s B A``) or ``bra`` (``s B R A``); ``changes_base`` whether `Start.base` is given.
    """

    statistic: ClassVar[str] = "none"
    form: ClassVar[frozenset[str]] = frozenset({"ba"})
    changes_base: ClassVar[bool] = False

    def check(self, form: str) -> None:
        """Raises `ConfigError` unless an adapter of the form ``form`` (`Adapter.form`) can begin so."""
        name = type(self).__name__
        if ("bra" if form == "core" else "ba") not in self.form:
            allowed = "for adapters B R A alone" if "bra" in self.form else "for adapters without an R"
            raise ConfigError("adapter.init", name, allowed, "See `shoal list adapter/init`.")
        if form == "gated" and self.changes_base:
            # The base takes back s B A, and a gate makes something else of it.
            raise ConfigError("adapter.init", name, "one whose B starts at zero, for an adapter with a gate")

    @abstractmethod
    def start(self, site: Site) -> Start:
        """The start of one module. Randomness is drawn from ``site.generator`` alone.

        Raises `ConfigError` for a rank that the module can't have and `ShoalError` for a statistic that nothing can be
        computed from.
        """


@dataclass(frozen=True)
class DataDriven(Initialisation):
    """An initialisation that looks at data: where its sample comes from is declared, and said in the run's card.

    ``source``: ``public``, a sample that is nobody's secret; ``client``, one client's; ``clients``, all clients', each
    of whom sends the sum over its own sample; ``private``, the same sums made differentially private before they are
    sent. There each example's statistic z, all modules together, is clipped to ``min(1, clip / |z|_2) z`` and a client
    sends the sum plus N(0, (noise clip)^2 I), the Gaussian mechanism.

    The neighbouring data sets differ by one example of one client, added or removed, and clients hold disjoint data;
    so the sum differs by at most ``clip``. That needs a sample in which no example decides about another: see
    `sample`.
    """

    source: str = setting("clients", choices=SOURCES, help="whose data: public, client (one), clients (all), private")
    examples: int = setting(64, ge=1, help="examples that each holder uses (on average, where private)")
    client: int = setting(0, ge=0, help="the client that is asked, for source=client")
    clip: float = setting(1.0, gt=0, help="norm that each example is clipped to, for source=private")
    noise: float = setting(1.0, gt=0, help="standard deviation of the noise in units of clip, for source=private")

    def sample(self, total: int, generator: np.random.Generator) -> np.ndarray:
        """Sorted indices of the examples to use of a holder's ``total``.

        Private: each example by itself with probability ``min(1, examples / total)``, so one more or less changes
        nothing else (the rate is taken as public, as in DP-SGD; the sample may be empty). Otherwise exactly
        ``min(examples, total)`` of them, drawn without replacement.
        """
        if self.source == "private":
            return np.flatnonzero(generator.random(total) < self.examples / max(total, 1))
        return np.sort(generator.choice(total, min(self.examples, total), replace=False))

    def epsilon(self, n: int) -> float:
        """epsilon at ``delta = 1/n`` of one client's release; infinite unless the source is private.

        One Gaussian mechanism of noise multiplier ``noise``, by Opacus' RDP accountant (sample rate 1, one step): the
        sampling of examples is given no credit. Raises `ConfigError` for n < 2.
        """
        if self.source != "private":
            return math.inf
        if n < 2:
            raise ConfigError("adapter.init.source", self.source, "a client with at least 2 examples, for delta = 1/n")
        from opacus.accountants.analysis import rdp

        # The best order is near 1 + noise sqrt(2 log n).
        best = 1 + self.noise * math.sqrt(2 * math.log(n))
        orders = np.unique(1 + (best - 1) * np.geomspace(0.02, 50, 400)).tolist()
        spent = rdp.compute_rdp(q=1.0, noise_multiplier=self.noise, steps=1, orders=orders)
        return max(0.0, float(rdp.get_privacy_spent(orders=orders, rdp=spent, delta=1 / n)[0]))

    def statement(self, n: int | None = None) -> str:
        """Where the sample comes from, and what it reveals or guarantees.

        ``n`` is the number of examples behind ``delta = 1/n`` (the smallest client's); None takes ``examples``.
        """
        what = {"gradient": "summed gradients", "moment": "summed second moments of layer inputs"}[self.statistic]
        if self.source == "public":
            return (
                f"The adapter's start was computed from the {what} of up to {self.examples} public examples: it "
                "reveals nothing about the clients' data."
            )
        if self.source == "client":
            return (
                f"The adapter's start was computed from the {what} of up to {self.examples} examples of client "
                f"{self.client}, sent without noise: it may reveal them to the server and to every client, and no "
                "privacy guarantee covers it."
            )
        if self.source == "clients":
            return (
                f"The adapter's start was computed from the {what} of up to {self.examples} examples of each client, "
                "sent without noise: it may reveal them to the server and to every client, and no privacy guarantee "
                "covers it."
            )
        n = self.examples if n is None else n
        return (
            f"The adapter's start was computed from the {what} of about {self.examples} examples of each client, each "
            f"example clipped to norm {self.clip:g} over all modules and Gaussian noise of standard deviation "
            f"{self.noise:g} x {self.clip:g} added by the client before sending: for one example, added or removed, "
            f"this one release is ({self.epsilon(n):.3g}, {1 / n:.3g})-differentially private (delta = 1/{n}; "
            "Opacus' RDP accountant, no credit for sampling), and whatever training spends comes on top. The noise is "
            "drawn from the run's seed, as all that a simulation draws, so this holds against those who do not know it."
        )


def exact(weight: Tensor) -> Tensor:
    """``weight`` in float64 on the CPU, where every factorisation is done."""
    return weight.detach().to("cpu", torch.float64)


def needed(statistic: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """``statistic`` in float64, checked. Raises ValueError for none or a wrong shape, `ShoalError` if not finite."""
    if statistic is None or tuple(statistic.shape) != shape:
        found = None if statistic is None else tuple(statistic.shape)
        raise ValueError(f"this initialisation needs a statistic of shape {shape}, not {found}")
    if not torch.isfinite(statistic).all():
        raise ShoalError("the statistic for the adapter's initialisation is not finite: check the data and the clip")
    return exact(statistic)


def check_rank(rank: int, most: int, what: str = "the smaller side of each adapted weight") -> None:
    """Raises `ConfigError` where ``rank`` is above ``most``."""
    if rank > most:
        raise ConfigError(
            "adapter.rank", rank, f"at most {most} with this initialisation, {what}", "Choose a lower rank."
        )
