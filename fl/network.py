"""How long a client's work takes and whether it gets through (the ``network=`` group).

A job is a download, local steps and an upload::

    down_s = latency_s + 8 bytes_down / (down_mbps 10^6)     compute_s = steps seconds_per_step     up_s likewise

All of it is a pure function of the run's seed, the client and the round, so it never depends on what else happened.
Nothing here waits: the clock of `fl.clock` jumps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from fl.clock import ticks
from fl.config import setting
from fl.errors import ConfigError
from fl.keys import Part, generator
from fl.trace import Device, read_trace


@dataclass(frozen=True)
class Job:
    """The times of one client's work. ``total`` is in ticks, each part rounded by itself and then added.

    ``dropped_at`` is the tick after the start at which the client is lost without a word, or None.
    """

    down_s: float
    compute_s: float
    up_s: float
    total: int
    dropped_at: int | None


@dataclass(frozen=True)
class Network(ABC):
    """What the models share: a device for each client, and jobs that may die on the way."""

    dropout: float = setting(0.0, ge=0, le=1, help="probability that a client's work in a round is lost on the way")

    def check(self, number: int) -> None:  # noqa: B027, most models serve any number
        """Raise `ConfigError` if this model can't serve clients 0 to ``number`` - 1."""

    @property
    def cycle(self) -> int | None:
        """Ticks after which everyone's availability repeats; None where it does not, but comes to an end or stays."""
        return None

    @abstractmethod
    def device(self, seed: int, client: int) -> Device:
        """The speed and link of ``client``."""

    def job(self, seed: int, client: int, round: int, steps: int, bytes_down: int, bytes_up: int, *stage: Part) -> Job:
        """The times of ``client``'s work in ``round``; whether it dies, and when, is drawn from the job's own key.

        ``stage`` names what is done beside the training of that round.
        """
        device = self.device(seed, client)
        down_s = device.latency_s + _transfer_s(bytes_down, device.down_mbps)
        compute_s = steps * device.seconds_per_step
        up_s = device.latency_s + _transfer_s(bytes_up, device.up_mbps)
        total = ticks(down_s) + ticks(compute_s) + ticks(up_s)
        dropped_at = None
        if self.dropout:
            lost, when = generator(seed, "network", client, round, *stage).random(2)
            dropped_at = int(when * total) if lost < self.dropout else None
        return Job(down_s, compute_s, up_s, total, dropped_at)

    def available(self, seed: int, client: int, now: int) -> bool:
        """Whether ``client`` can start work at tick ``now``."""
        return self.next_available(seed, client, now) == now

    def next_available(self, seed: int, client: int, now: int) -> int | None:
        """The first tick >= ``now`` at which ``client`` can start work; None if there is none."""
        return now


def _transfer_s(size: int, mbps: float | None) -> float:
    return 0.0 if mbps is None else 8 * size / (mbps * 1e6)


@dataclass(frozen=True)
class _OnAndOff(Network):
    """Clients that come and go: each is on for a share of every period, from a phase of its own."""

    availability: float = setting(1.0, gt=0, le=1, help="share of the time in which a client can start work")
    availability_period_s: float = setting(3600.0, gt=0, le=1e9, help="a client goes on and off once in this time")

    @property
    def cycle(self) -> int | None:
        return max(1, ticks(self.availability_period_s))

    def next_available(self, seed: int, client: int, now: int) -> int | None:
        if self.availability == 1:
            return now
        period = max(1, ticks(self.availability_period_s))
        on = max(1, round(self.availability * period))
        phase = int(generator(seed, "availability", client).integers(period))
        position = (now + phase) % period
        return now if position < on else now + period - position


@dataclass(frozen=True)
class Instant(_OnAndOff):
    """Everything takes no time: rounds without a network."""

    def device(self, seed: int, client: int) -> Device:
        return Device(0.0, 0.0, None, None)


@dataclass(frozen=True)
class Uniform(_OnAndOff):
    """All clients alike."""

    seconds_per_step: float = setting(0.1, ge=0, le=1e6, help="time of one local step")
    latency_s: float = setting(0.05, ge=0, le=1e6, help="delay of a message, each way")
    down_mbps: float | None = setting(50.0, gt=0, help="download rate in 10^6 bits a second; null: unlimited")
    up_mbps: float | None = setting(10.0, gt=0, help="upload rate in 10^6 bits a second; null: unlimited")

    def device(self, seed: int, client: int) -> Device:
        return Device(self.seconds_per_step, self.latency_s, self.down_mbps, self.up_mbps)


@dataclass(frozen=True)
class Lognormal(Uniform):
    """Fast and slow clients: the values of `Uniform` are medians, each times exp(sigma z), with z ~ N(0, 1).

    Drawn once for each client: one z for its speed, one for its link (both rates), one for its latency.
    """

    speed_sigma: float = setting(0.5, ge=0, le=5, help="spread of seconds_per_step; 0.5: the slowest tenth takes 1.9x")
    link_sigma: float = setting(0.5, ge=0, le=5, help="spread of the rates, and of the latency")

    def device(self, seed: int, client: int) -> Device:
        speed, link, latency = generator(seed, "network", client).standard_normal(3)
        rate = math.exp(self.link_sigma * link)
        return Device(
            self.seconds_per_step * math.exp(self.speed_sigma * speed),
            self.latency_s * math.exp(self.link_sigma * latency),
            None if self.down_mbps is None else self.down_mbps * rate,
            None if self.up_mbps is None else self.up_mbps * rate,
        )


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

    def device(self, seed: int, client: int) -> Device:
        if client not in self.devices:
            raise ConfigError("network.path", self.path, f"it must list every client; there is no client {client}")
        return self.devices[client]

    def next_available(self, seed: int, client: int, now: int) -> int | None:
        windows = self.device(seed, client).windows
        if not windows:
            return now
        lap = ticks(self.repeat_s) if self.repeat_s is not None else 0
        start = now - now % lap if lap else 0
        for base in (start, start + lap) if lap else (0,):
            for opens, closes in windows:
                if now < base + closes:
                    return max(now, base + opens)
        return None
