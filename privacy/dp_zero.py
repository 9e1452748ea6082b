"""DPZero at every peer: example-level differential privacy for scalars of zeroth-order probes.

A peer's scalar is the noisy mean of its samples' clipped slopes along one direction (`fl.one_byte.probes`; DPZero,
arXiv 2310.09639)::

    g = (1 / m) [ sum_j clip((l_j(theta + eps z) - l_j(theta - eps z)) / (2 eps), -C, C) + N(0, (noise C)^2) ]

Batches are Poisson samples of rate ``q_i = batch_size / n_i``, m is their expected size. Neighbours differ by one
example of one peer, added or removed: the sum then moves by C at most, so a scalar is one release of the Gaussian
mechanism with that noise multiplier and rate, whatever the number of parameters. The directions are public. Rounding to
a byte, other peers' steps and all that is made of the model are post-processing.

(Where one example is replaced by another the sum moves by 2 C, which is where the 2 of DPZero's own code comes from.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fl.config import setting
from fl.errors import ConfigError
from privacy import accounting, example_level
from privacy.accounting import ACCOUNTANTS
from privacy.base import Guard, Privacy, Statement, check_target
from privacy.dp_sgd import DPSGD, DPSGDGuard

if TYPE_CHECKING:
    from clients.adapters.space import Space
    from fl.experiment import Settings


@dataclass(frozen=True)
class DPZero(Privacy):
    """Clipped and noised scalars of schedule=just_one_byte.

    ``epsilon`` is a target for each peer at its own ``delta`` (null: 1/n_i), and sets the noise; ``noise_multiplier``
    sets the noise instead, and with a target beside it the peer stops when its next scalar would exceed it.
    """

    unit: ClassVar[str | None] = "example"
    scalars: ClassVar[bool] = True  # it protects scalars, and nothing else

    epsilon: float | None = setting(3.0, gt=0, help="target for each peer; sets the noise, or where to stop")
    delta: float | None = setting(None, gt=0, lt=1, help="null: 1/n_i at a peer with n_i examples")
    noise_multiplier: float | None = setting(None, gt=0, help="noise in units of clip; null: calibrated to epsilon")
    clip: float = setting(1.0, gt=0, help="largest size of each example's slope along a direction")
    accountant: str = setting("rdp", choices=ACCOUNTANTS, help="how scalars are composed")

    def __post_init__(self) -> None:
        check_target(self.epsilon, self.noise_multiplier)

    def check(self, settings: Settings) -> None:
        from fl.schedules.just_one_byte import JustOneByte

        if not isinstance(settings.schedule, JustOneByte):
            name = type(settings.schedule).__name__
            way_out = "Use schedule=just_one_byte, or privacy=dp_sgd for updates."
            raise ConfigError(
                "schedule", name, "just_one_byte with privacy=dp_zero: it protects scalars alone", way_out
            )
        example_level.check(settings)

    def guard(self, settings: Settings, sizes: Sequence[int], space: Space) -> Guard:
        return DPZeroGuard(self, settings, sizes)


class DPZeroGuard(DPSGDGuard):
    """Plans every peer's noise, grants its scalars, and states what they cost.

    A scalar is to the books what a step of DP-SGD is: one sampled Gaussian release of sensitivity C.
    """

    def __init__(self, privacy: DPZero, settings: Settings, sizes: Sequence[int]):
        p = privacy
        plan = DPSGD(p.epsilon, p.delta, p.noise_multiplier, p.clip, accountant=p.accountant)
        super().__init__(plan, settings, sizes)

    def statement(self) -> Statement:
        p, rows = self.privacy, self.rows(self.sizes)
        taken = sorted({row["steps"] for row in rows})
        return example_level.statement(
            "DPZero at every peer",
            rows,
            target=p.epsilon,
            sampling=f"Poisson, at rate batch_size/n_i ({_range(self.rates)}), divisor the expected batch",
            clipping=f"each example's slope along a direction to [-C, C], C = {p.clip:g}",
            noise=f"Gaussian, {_range(self.noises)} x C on the sum of a batch, drawn by the peer from the run's seed, "
            "before the scalar is quantised",
            participation=f"up to all {self.rounds} rounds of a peer; {_range(taken)} scalars sent",
            accountant=accounting.named(p.accountant),
            against="the other peers and whoever sees the models, if they do not know the seed of the noise: the "
            "directions are public, and a real peer draws its noise from a generator of its own",
        )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"
