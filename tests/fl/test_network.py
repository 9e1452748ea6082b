"""Times follow from sizes and speeds, draws from their keys, and a bad trace is refused with its line."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

import configs
import fl.network
from fl.clock import ticks
from fl.config import build
from fl.errors import ConfigError
from fl.network import Instant, Lognormal, Network, Trace, Uniform

HEADER = "client,seconds_per_step,latency_s,up_mbps,down_mbps"
WINDOWS = HEADER + ",from_s,until_s"


def trace(tmp_path, *rows, header=HEADER, **settings) -> Trace:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return Trace(path=str(path), **settings)


def test_instant_takes_no_time():
    job = Instant().job(0, 3, 1, 50, 10**9, 10**9)
    assert (job.down_s, job.compute_s, job.up_s, job.total, job.dropped_at) == (0, 0, 0, 0, None)


def test_uniform_times_follow_from_sizes():
    network = Uniform(seconds_per_step=0.2, latency_s=0.05, down_mbps=40.0, up_mbps=8.0)
    job = network.job(0, 3, 1, 10, 1_000_000, 2_000_000)
    assert job.down_s == pytest.approx(0.05 + 0.2)  # 8 Mbit at 40 Mbit/s
    assert job.compute_s == pytest.approx(2.0)
    assert job.up_s == pytest.approx(0.05 + 2.0)  # 16 Mbit at 8 Mbit/s
    assert job.total == 250_000 + 2_000_000 + 2_050_000
    assert network.job(9, 5, 7, 10, 1_000_000, 2_000_000) == job


def test_unlimited_rates_leave_the_latency():
    job = Uniform(seconds_per_step=0, latency_s=0.5, down_mbps=None, up_mbps=None).job(0, 0, 1, 10, 10**9, 10**9)
    assert (job.down_s, job.up_s, job.total) == (0.5, 0.5, 1_000_000)


def test_parts_are_rounded_before_they_are_added():
    job = Uniform(seconds_per_step=0.6e-6, latency_s=0.6e-6, down_mbps=None, up_mbps=None).job(0, 0, 1, 1, 0, 0)
    assert job.total == 3  # 1.8 microseconds in all


def test_lognormal_draws_each_client_once():
    network = Lognormal(seconds_per_step=0.1, speed_sigma=0.5, link_sigma=0.7)
    devices = [network.device(4, c) for c in range(2000)]
    assert devices[17] == network.device(4, 17) != network.device(5, 17)
    logs = {
        name: np.log([getattr(d, name) for d in devices])
        for name in ("seconds_per_step", "latency_s", "down_mbps", "up_mbps")
    }
    for name, median, sigma in (
        ("seconds_per_step", 0.1, 0.5), ("latency_s", 0.05, 0.7), ("down_mbps", 50, 0.7), ("up_mbps", 10, 0.7),
    ):  # fmt: skip
        assert logs[name].mean() == pytest.approx(np.log(median), abs=0.06)
        assert logs[name].std() == pytest.approx(sigma, rel=0.06)
    np.testing.assert_allclose(logs["down_mbps"] - logs["up_mbps"], np.log(5))  # one link, both ways
    assert abs(np.corrcoef(logs["seconds_per_step"], logs["up_mbps"])[0, 1]) < 0.1
    jobs = [network.job(4, 17, round, 10, 10**6, 10**6) for round in (1, 2)]
    assert jobs[0] == jobs[1]


def test_lognormal_without_spread_is_uniform():
    same = Lognormal(speed_sigma=0.0, link_sigma=0.0).job(1, 2, 3, 4, 5000, 6000)
    assert same == Uniform().job(1, 2, 3, 4, 5000, 6000)
    assert Lognormal(down_mbps=None).device(0, 1).down_mbps is None


def test_dropouts_follow_their_probability_and_their_key():
    network = Uniform(dropout=0.3)
    jobs = [network.job(0, c, r, 10, 1000, 1000) for c in range(40) for r in range(50)]
    lost = [job.dropped_at for job in jobs if job.dropped_at is not None]
    assert len(lost) / len(jobs) == pytest.approx(0.3, abs=0.035)
    assert all(0 <= at < job.total for job in jobs if (at := job.dropped_at) is not None)
    assert np.mean(lost) / jobs[0].total == pytest.approx(0.5, abs=0.05)
    assert network.job(0, 3, 9, 10, 1000, 1000) == network.job(0, 3, 9, 10, 1000, 1000)
    fates = {tuple(network.job(s, 3, r, 1, 0, 0).dropped_at is None for r in range(20)) for s in range(5)}
    assert len(fates) == 5
    assert all(Uniform(dropout=1.0).job(0, c, 1, 1, 0, 0).dropped_at is not None for c in range(50))
    assert all(Uniform(dropout=0.0).job(0, c, 1, 1, 0, 0).dropped_at is None for c in range(50))


def test_a_client_dies_at_the_same_share_of_its_work_however_long_that_is():
    short, long = (Uniform(dropout=1.0).job(0, 1, 1, steps, 0, 0) for steps in (10, 1000))
    assert short.dropped_at / short.total == pytest.approx(long.dropped_at / long.total, abs=1e-4)


def test_availability_is_a_share_of_the_time():
    network = Instant(availability=0.25, availability_period_s=100.0)
    instants = range(0, ticks(100), ticks(0.5))
    for client in range(5):
        on = [network.available(0, client, now) for now in instants]
        assert np.mean(on) == pytest.approx(0.25, abs=0.01)
        assert sum(a != b for a, b in zip(on, on[1:] + on[:1], strict=True)) == 2  # one window a period
        assert [network.available(0, client, now + ticks(100)) for now in instants] == on
    brief = Instant(availability=0.3, availability_period_s=10e-6)  # 3 ticks of 10
    assert sum(brief.available(0, 0, now) for now in range(100)) == 30
    phases = {network.next_available(0, c, 0) for c in range(20)}
    assert len(phases) > 10


@pytest.mark.parametrize("network", [Instant(availability=0.3, availability_period_s=10.0), Uniform()], ids=repr)
def test_the_next_available_tick_is_the_first(network):
    for client in range(10):
        for now in range(0, ticks(20), 123_457):
            then = network.next_available(0, client, now)
            assert then >= now
            assert network.available(0, client, then)
            assert network.available(0, client, now) == (then == now)
            if then > now:
                assert not network.available(0, client, then - 1)


def test_always_available_by_default():
    assert all(
        network.available(0, c, now) for network in (Instant(), Lognormal()) for c in range(5) for now in (0, 10**12)
    )


def test_a_trace_gives_each_client_its_device(tmp_path):
    network = trace(tmp_path, "0,0.5,0.1,8,80", "7,1,0,,")
    job = network.job(0, 0, 1, 2, 10**6, 10**6)
    assert (job.down_s, job.compute_s, job.up_s) == pytest.approx((0.1 + 0.1, 1.0, 0.1 + 1.0))
    job = network.job(0, 7, 1, 2, 10**6, 10**6)
    assert (job.down_s, job.compute_s, job.up_s) == (0, 2, 0)
    assert network.available(0, 0, 10**15)


def test_the_order_of_columns_is_free(tmp_path):
    network = trace(tmp_path, "80,8,0.1,0.5,0", header="down_mbps,up_mbps,latency_s,seconds_per_step,client")
    device = network.device(0, 0)
    assert (device.seconds_per_step, device.latency_s, device.up_mbps, device.down_mbps) == (0.5, 0.1, 8, 80)


def test_windows_of_availability(tmp_path):
    network = trace(tmp_path, "0,1,0,1,1,10,20", "1,1,0,1,1,,", "0,,,,,5,8", "0,1,0,1,1,20,21", header=WINDOWS)
    at = {5: True, 7.999999: True, 8: False, 9: False, 10: True, 19: True, 20: True, 20.9: True, 21: False, 4.9: False}
    assert {s: network.available(0, 0, ticks(s)) for s in at} == at
    assert network.next_available(0, 0, 0) == ticks(5)
    assert network.next_available(0, 0, ticks(8)) == ticks(10)
    assert network.next_available(0, 0, ticks(12)) == ticks(12)
    assert network.next_available(0, 0, ticks(21)) is None
    assert network.available(0, 1, ticks(1000))


def test_windows_may_repeat(tmp_path):
    network = trace(tmp_path, "0,1,0,1,1,5,8", "0,,,,,20,30", header=WINDOWS, repeat_s=30.0)
    for lap in range(3):
        assert network.available(0, 0, ticks(30 * lap + 6))
        assert not network.available(0, 0, ticks(30 * lap + 10))
        assert network.next_available(0, 0, ticks(30 * lap + 10)) == ticks(30 * lap + 20)
    assert network.next_available(0, 0, ticks(30)) == ticks(35)
    network = trace(tmp_path, "0,1,0,1,1,5,8", header=WINDOWS, repeat_s=30.0)
    assert network.next_available(0, 0, ticks(9)) == ticks(35)


def test_a_trace_must_list_every_client(tmp_path):
    network = trace(tmp_path, "0,1,0,1,1", "1,1,0,1,1", "3,1,0,1,1")
    network.check(2)
    with pytest.raises(ConfigError, match=r"network.path=.*no client 2"):
        network.check(4)
    with pytest.raises(ConfigError, match=r"no client 9"):
        network.job(0, 9, 1, 1, 0, 0)
    for other in (Instant(), Uniform(), Lognormal()):
        other.check(10**6)


def test_a_trace_needs_a_file():
    for path in (None, ""):
        with pytest.raises(ConfigError, match=r"network.path=.*network.path=FILE"):
            Trace(path=path)


def test_a_repeat_must_cover_the_windows(tmp_path):
    with pytest.raises(ConfigError, match=r"network.repeat_s=10.0 .*20 s"):
        trace(tmp_path, "0,1,0,1,1,5,20", header=WINDOWS, repeat_s=10.0)


def test_settings_are_checked():
    made = build({"_target_": "fl.network.Uniform", "up_mbps": None, "dropout": 0.1}, "network", Network)
    assert made == Uniform(up_mbps=None, dropout=0.1)
    for name, bad in [("dropout", 1.5), ("latency_s", -1), ("up_mbps", 0), ("availability", 0), ("speed", 3)]:
        with pytest.raises(ConfigError, match=rf"network\.{name}="):
            build({"_target_": "fl.network.Uniform", name: bad}, "network", Network)
    with pytest.raises(ConfigError, match=r"network\.path="):
        build({"_target_": "fl.network.Trace", "path": None, "repeat_s": None, "dropout": 0.0}, "network", Network)


@pytest.mark.parametrize("path", sorted(Path(configs.__file__).parent.glob("network/*.yaml")), ids=lambda p: p.stem)
def test_every_option_names_every_setting_with_its_default(path):
    assert path.read_text().startswith("# ")
    values = OmegaConf.to_container(OmegaConf.load(path))
    kind = getattr(fl.network, values.pop("_target_").removeprefix("fl.network."))
    assert issubclass(kind, Network)
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.init}
    assert values == defaults
