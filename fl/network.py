"""How long clients work, when they can, and what gets lost (the ``network=`` group).

A model gives each client a device: seconds for a step, and a link of a latency and two rates. `fl.fleet` makes times of
them, with the server's links. All of it is a pure function of the run's seed, the client and the number of its job (the
round, in synchronous rounds), so it never depends on what else happened. Nothing here waits: the clock of `fl.clock`
jumps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np

from fl.clock import ticks
from fl.config import setting
from fl.errors import ConfigError
from fl.fleet import Fleet
from fl.keys import generator
from fl.trace import Device, read_trace


@dataclass(frozen=True)
class Network(ABC):
    """What the models share: a device for each client, and jobs that may die on the way."""

    dropout: float = setting(0.0, ge=0, le=1, help="probability that a client's work in a round is lost on the way")
    rejoin_s: float = setting(0.0, ge=0, le=1e9, help="time until a client that was lost can work again")
    on_leave: str = setting(
        "finish",
        choices=("finish", "lose", "pause"),
        help="work during which its client's window closes: finish, lose, or pause until the next",
    )
    server_down_mbps: float | None = setting(None, gt=0, help="rate of all downloads together; null: unlimited")
    server_up_mbps: float | None = setting(None, gt=0, help="rate of all uploads together; null: unlimited")
    varies: ClassVar[bool] = False  # whether a client's jobs of equal size take times of their own

    def check(self, number: int) -> None:  # noqa: B027, most models serve any number
        """Raise `ConfigError` if this model can't serve clients 0 to ``number`` - 1."""

    @property
    def cycle(self) -> int | None:
        """Ticks after which everyone's availability repeats; None where it does not, but comes to an end or stays."""
        return None

    @abstractmethod
    def device(self, seed: int, client: int, number: int) -> Device:
        """The speed and link of ``client``, one of ``number``."""

    def compute_s(self, seed: int, client: int, job: int, steps: int, device: Device) -> float:
        """Seconds of ``steps`` local steps of ``client``'s job number ``job``."""
        return steps * device.seconds_per_step

    def fleet(self, seed: int, number: int) -> Fleet:
        """The ``number`` clients' devices and links at work in the run with ``seed``."""
        return Fleet(self, seed, number)

    def available(self, seed: int, client: int, now: int) -> bool:
        """Whether ``client`` can start work at tick ``now``."""
        return self.next_available(seed, client, now) == now

    def next_available(self, seed: int, client: int, now: int) -> int | None:
        """The first tick >= ``now`` at which ``client`` can start work; None if there is none."""
        return now

    def leaves(self, seed: int, client: int, now: int) -> int | None:
        """The first tick >= ``now`` at which ``client`` can't start work; None if there is none."""
        return None

    @property
    def always_available(self) -> bool:
        """Whether every client can start work at every time, whatever happened before."""
        return not (self.dropout and self.rejoin_s)

    @property
    def steady(self) -> bool:
        """Whether every job of a client takes the same time and arrives: no chance, hours or queues in it."""
        queues = self.server_down_mbps is not None or self.server_up_mbps is not None
        return self.always_available and not (self.varies or self.dropout or queues)


@dataclass(frozen=True)
class _OnAndOff(Network):
    """Clients that come and go: each is on for a share of every period, from a phase of its own."""

    availability: float = setting(1.0, gt=0, le=1, help="share of the time in which a client can start work")
    availability_period_s: float = setting(3600.0, gt=0, le=1e9, help="a client goes on and off once in this time")

    @property
    def cycle(self) -> int | None:
        return max(1, ticks(self.availability_period_s))

    @property
    def always_available(self) -> bool:
        return super().always_available and self.availability == 1

    def next_available(self, seed: int, client: int, now: int) -> int | None:
        position, on, period = self._position(seed, client, now)
        return now if position < on else now + period - position

    def leaves(self, seed: int, client: int, now: int) -> int | None:
        position, on, period = self._position(seed, client, now)
        return None if on == period else now + max(0, on - position)

    def _position(self, seed: int, client: int, now: int) -> tuple[int, int, int]:
        """Ticks into the client's period, how many of them it is on, and how long the period is."""
        period = max(1, ticks(self.availability_period_s))
        if self.availability == 1:
            return 0, period, period
        on = max(1, round(self.availability * period))
        phase = int(generator(seed, "availability", client).integers(period))
        return (now + phase) % period, on, period


@dataclass(frozen=True)
class Instant(_OnAndOff):
    """Everything takes no time: rounds without a network."""

    def device(self, seed: int, client: int, number: int) -> Device:
        return Device(0.0, 0.0, None, None)


@dataclass(frozen=True)
class _Devices(_OnAndOff):
    """Clients whose devices follow from a few numbers; here all alike."""

    seconds_per_step: float = setting(0.1, ge=0, le=1e6, help="time of one local step")
    latency_s: float = setting(0.05, ge=0, le=1e6, help="delay of a message, each way")
    down_mbps: float | None = setting(50.0, gt=0, help="download rate in 10^6 bits a second; null: unlimited")
    up_mbps: float | None = setting(10.0, gt=0, help="upload rate in 10^6 bits a second; null: unlimited")

    def device(self, seed: int, client: int, number: int) -> Device:
        return Device(self.seconds_per_step, self.latency_s, self.down_mbps, self.up_mbps)


@dataclass(frozen=True)
class Uniform(_Devices):
    """All clients alike, but for some that may be named: a step of theirs takes ``slow_factor`` times as long."""

    slow_clients: list[int] | None = setting(None, help="clients that are slow (from 0); null: none")
    slow_factor: float = setting(10.0, gt=0, le=1e6, help="how many times as long a step of theirs takes")

    def check(self, number: int) -> None:
        beyond = [client for client in self.slow_clients or () if not 0 <= client < number]
        if beyond:
            allowed = f"clients 0 to {number - 1}; there is no client {beyond[0]}"
            raise ConfigError("network.slow_clients", self.slow_clients, allowed)

    def device(self, seed: int, client: int, number: int) -> Device:
        device = super().device(seed, client, number)
        if client not in (self.slow_clients or ()):
            return device
        return replace(device, seconds_per_step=self.slow_factor * device.seconds_per_step)


@dataclass(frozen=True)
class Linear(_Devices):
    """Evenly spread speeds: a step of client i of M takes seconds_per_step (1 - spread i / (M - 1)).

    The FedFix paper (arXiv 2206.10189) calls spread = 0.8 "F-80". Client 0 is the slowest, and the only one of one.
    """

    spread: float = setting(0.8, ge=0, lt=1, help="by what share of the slowest client's time the fastest is faster")
    shuffle: bool = setting(False, help="who has which speed is drawn, instead of client 0 being the slowest")

    def device(self, seed: int, client: int, number: int) -> Device:
        place = _places(seed, number)[client] if self.shuffle else client
        share = self.spread * place / max(1, number - 1)
        return replace(super().device(seed, client, number), seconds_per_step=self.seconds_per_step * (1 - share))


@lru_cache(maxsize=4)
def _places(seed: int, number: int) -> tuple[int, ...]:
    """The place of each client in the order of speeds."""
    return tuple(generator(seed, "network order").permutation(number).tolist())


@dataclass(frozen=True)
class Lognormal(_Devices):
    """Fast and slow clients: the values of `Uniform` are medians, each times exp(sigma z), with z ~ N(0, 1).

    Drawn once for each client: one z for its speed, one for its link (both rates), one for its latency.
    """

    speed_sigma: float = setting(0.5, ge=0, le=5, help="spread of seconds_per_step; 0.5: the slowest tenth takes 1.9x")
    link_sigma: float = setting(0.5, ge=0, le=5, help="spread of the rates, and of the latency")

    def device(self, seed: int, client: int, number: int) -> Device:
        speed, link, latency = generator(seed, "network", client).standard_normal(3)
        rate = math.exp(self.link_sigma * link)
        return Device(
            self.seconds_per_step * math.exp(self.speed_sigma * speed),
            self.latency_s * math.exp(self.link_sigma * latency),
            None if self.down_mbps is None else self.down_mbps * rate,
            None if self.up_mbps is None else self.up_mbps * rate,
        )


@dataclass(frozen=True)
class GilbertElliott(_Devices):
    """Clients with good and bad spells: each is a Markov chain over its own jobs k = 0, 1, 2, ...

    ::

        P(bad_k | good_{k-1}) = p_gb        P(good_k | bad_{k-1}) = p_bg        P(bad_0) = p_gb / (p_gb + p_bg)
        compute_s = (seconds_per_job + steps seconds_per_step) (slowdown if bad, else 1),  0 where there is no step

    (Gilbert 1960, Elliott 1963: bursts of errors.) P(bad_0) is the stationary distribution, so every P(bad_k) is that.
    A spell of bad jobs has 1 / p_bg of them in the mean, and one of good jobs 1 / p_gb.
    """

    p_gb: float = setting(0.05, ge=0, le=1, help="probability that a bad job follows a good one")
    p_bg: float = setting(0.5, ge=0, le=1, help="probability that a good job follows a bad one")
    slowdown: float = setting(10.0, ge=1, le=1e6, help="how many times as long a bad job's work takes")
    seconds_per_job: float = setting(0.0, ge=0, le=1e6, help="time of a job's work beside its steps")
    varies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.p_gb + self.p_bg == 0:
            allowed = "above 0 where p_gb is 0: a chain that never changes has no stationary distribution"
            raise ConfigError("network.p_bg", self.p_bg, allowed, "Use network=uniform for clients without bad jobs.")

    def compute_s(self, seed: int, client: int, job: int, steps: int, device: Device) -> float:
        if not steps:
            return 0.0
        factor = self.slowdown if self.bad(seed, client, job) else 1.0
        return factor * (self.seconds_per_job + steps * device.seconds_per_step)

    def bad(self, seed: int, client: int, job: int) -> bool:
        """Whether job number ``job`` of ``client`` is a bad one.

        One uniform number u_k decides each job: it is bad if u_k < P(bad_k | the job before). A u_k that decides alike
        after either state makes the past irrelevant, so the walk goes back to the last such job only: about
        1 / (1 - |1 - p_gb - p_bg|) jobs, however many there were.
        """
        low, high = sorted((self.p_gb, 1 - self.p_bg))
        block, flips, uniforms = -1, 0, np.empty(0)
        for k in range(job, -1, -1):
            if k // _BLOCK != block:
                block = k // _BLOCK
                uniforms = generator(seed, "gilbert elliott", client, block).random(_BLOCK)
            u = uniforms[k % _BLOCK]
            if k == 0:
                low = high = self.p_gb / (self.p_gb + self.p_bg)
            if not low <= u < high:
                return bool((u < low) != (flips % 2 == 1))
            flips += self.p_gb > 1 - self.p_bg  # between the two a job is as the one before, or as it was not
        raise AssertionError("job 0 depends on no other")


_BLOCK = 64  # uniform numbers of one key


@dataclass(frozen=True)
class Trace(Network):
    """Devices and their hours of availability, measured or made up, from a csv file (see `fl.trace`)."""

    path: str | None = setting(None, help="csv file with the columns of fl.trace")
    repeat_s: float | None = setting(None, gt=0, le=1e9, help="the windows start again after this time; null: never")
    devices: dict[int, Device] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("network.path", self.path, "a csv file is needed", "Give one with network.path=FILE.")
        devices = read_trace(self.path, "network.path")
        if self.repeat_s is not None:
            latest = max((until for d in devices.values() for _, until in d.windows), default=0)
            if latest > ticks(self.repeat_s):
                allowed = f"not less than the end of the last window, {latest / 1e6:g} s"
                raise ConfigError("network.repeat_s", self.repeat_s, allowed)
        object.__setattr__(self, "devices", devices)

    def check(self, number: int) -> None:
        missing = [client for client in range(number) if client not in self.devices]
        if missing:
            allowed = f"it must list clients 0 to {number - 1}; there is no client {missing[0]}"
            raise ConfigError("network.path", self.path, allowed, "Add its row, or lower clients.number.")

    @property
    def cycle(self) -> int | None:
        return None if self.repeat_s is None else ticks(self.repeat_s)

    def device(self, seed: int, client: int, number: int) -> Device:
        return self._listed(client)

    def _listed(self, client: int) -> Device:
        if client not in self.devices:
            raise ConfigError("network.path", self.path, f"it must list every client; there is no client {client}")
        return self.devices[client]

    @property
    def always_available(self) -> bool:
        return super().always_available and not any(device.windows for device in self.devices.values())

    def next_available(self, seed: int, client: int, now: int) -> int | None:
        windows = self._listed(client).windows
        if not windows:
            return now
        for base in self._laps(now):
            for opens, closes in windows:
                if now < base + closes:
                    return max(now, base + opens)
        return None

    def leaves(self, seed: int, client: int, now: int) -> int | None:
        windows = self._listed(client).windows
        if not windows:
            return None
        end = now
        for base in self._laps(now):
            for opens, closes in windows:
                if base + opens <= end < base + closes:
                    end = base + closes
        # Windows that touch for a whole lap do so forever.
        return None if self.cycle is not None and end >= now + self.cycle else end

    def _laps(self, now: int) -> tuple[int, ...]:
        """The tick at which this lap of the windows began, and the next lap."""
        return (0,) if self.cycle is None else (now - now % self.cycle, now - now % self.cycle + self.cycle)


@dataclass(frozen=True)
class WallClock(Network):
    """No model: messages take the time they take, and the clock is the wall's (`fl.wall`)."""

    rejoin_s: float = setting(10.0, ge=0, le=1e9, help="a client that was lost or failed is asked again after this")
    timeout_s: float = setting(3600.0, gt=0, le=1e9, help="a client that has not answered for so long counts as lost")
    dropout: float = field(init=False, default=0.0)
    on_leave: str = field(init=False, default="finish")
    server_down_mbps: float | None = field(init=False, default=None)
    server_up_mbps: float | None = field(init=False, default=None)
    varies: ClassVar[bool] = True

    def device(self, seed: int, client: int, number: int) -> Device:
        return Device(0.0, 0.0, None, None)  # nothing is planned

    def fleet(self, seed: int, number: int) -> Fleet:
        from fl.wall import WallFleet  # Flower is imported when a run begins

        return WallFleet(self, seed, number)

    @property
    def always_available(self) -> bool:
        return False
