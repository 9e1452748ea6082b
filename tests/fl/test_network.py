"""Devices follow from their model, draws from their keys, and windows open and close when they should."""

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
from fl.keys import generator
from fl.network import GilbertElliott, Instant, Linear, Lognormal, Network, Trace, Uniform
from fl.trace import Device
from tests.oracles.queues import chain

HEADER = "client,seconds_per_step,latency_s,up_mbps,down_mbps"
WINDOWS = HEADER + ",from_s,until_s"


def trace(tmp_path, *rows, header=HEADER, **settings) -> Trace:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return Trace(path=str(path), **settings)


def test_lognormal_draws_each_client_once():
    network = Lognormal(seconds_per_step=0.1, speed_sigma=0.5, link_sigma=0.7)
    devices = [network.device(4, c, 2000) for c in range(2000)]
    assert devices[17] == network.device(4, 17, 18) != network.device(5, 17, 18)
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


def test_lognormal_without_spread_is_uniform():
    same = Lognormal(speed_sigma=0.0, link_sigma=0.0).device(1, 2, 9)
    assert same == Uniform().device(1, 2, 9) == Device(0.1, 0.05, 50.0, 10.0)
    assert Lognormal(down_mbps=None).device(0, 1, 9).down_mbps is None


def test_some_clients_may_be_slow():
    network = Uniform(seconds_per_step=0.25, slow_clients=[4, 1], slow_factor=40.0)
    speeds = [network.device(0, c, 6).seconds_per_step for c in range(6)]
    assert speeds == [0.25, 10.0, 0.25, 0.25, 10.0, 0.25]
    assert network.device(0, 4, 6) == dataclasses.replace(network.device(0, 0, 6), seconds_per_step=10.0)
    network.check(5)
    for clients, number in (([4, 1], 4), ([-1], 9)):
        with pytest.raises(ConfigError, match=rf"network.slow_clients=.*clients 0 to {number - 1}; there is no client"):
            Uniform(slow_clients=clients).check(number)


def test_linear_speeds_are_those_of_fedfix():
    network = Linear(seconds_per_step=2.0, spread=0.8)
    assert [network.device(0, c, 5).seconds_per_step for c in range(5)] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])
    assert network.device(0, 0, 1).seconds_per_step == 2.0
    assert {Linear(spread=0.0).device(0, c, 7) for c in range(7)} == {Uniform().device(0, 0, 7)}


def test_linear_speeds_may_be_dealt_out():
    plain, dealt = Linear(), Linear(shuffle=True)

    def speeds(network, seed):
        return [network.device(seed, c, 30).seconds_per_step for c in range(30)]

    assert speeds(dealt, 3) == speeds(dealt, 3) != speeds(plain, 3)
    assert speeds(dealt, 3) != speeds(dealt, 4)
    assert sorted(speeds(dealt, 3)) == sorted(speeds(plain, 3))


CHAINS = [(0.3, 0.6), (0.02, 0.05), (0.9, 0.7), (0.0, 0.4), (0.4, 0.0), (1.0, 1.0), (0.25, 0.75)]


@pytest.mark.parametrize(("p_gb", "p_bg"), CHAINS)
def test_the_chain_is_the_one_that_goes_job_by_job(p_gb, p_bg):
    network = GilbertElliott(p_gb=p_gb, p_bg=p_bg)
    for client in range(4):
        uniforms = [u for block in range(4) for u in generator(9, "gilbert elliott", client, block).random(64)]
        expected = chain(uniforms, p_gb, p_bg)
        order = np.argsort(generator(client).random(256))  # a state does not depend on those asked for before
        assert {k: network.bad(9, client, int(k)) for k in order} == dict(enumerate(expected))


@pytest.mark.parametrize(("p_gb", "p_bg"), [(0.3, 0.6), (0.05, 0.1), (0.9, 0.7)])
def test_the_chain_is_stationary_and_changes_as_it_should(p_gb, p_bg):
    """Counts over independent clients within 7 standard deviations of their means, each variance >= 200: by Bernstein's
    inequality a false alarm has probability < 2e-9 each, < 1e-7 in all."""
    network, clients = GilbertElliott(p_gb=p_gb, p_bg=p_bg), 8000
    bad = {k: np.array([network.bad(2, c, k) for c in range(clients)]) for k in (0, 40, 41)}
    share = p_gb / (p_gb + p_bg)
    counts = [(states, share, clients) for states in bad.values()]
    counts += [(bad[40] & ~bad[41], p_bg, bad[40].sum()), (~bad[40] & bad[41], p_gb, (~bad[40]).sum())]
    for found, p, number in counts:
        variance = number * p * (1 - p)
        assert variance >= 200
        assert abs(found.sum() - number * p) < 7 * np.sqrt(variance)


def test_bad_jobs_take_longer():
    network = GilbertElliott(p_gb=0.5, p_bg=0.5, seconds_per_step=0.2, seconds_per_job=3.0, slowdown=7.0)
    device = network.device(1, 0, 5)
    times = {network.bad(1, 0, k): network.compute_s(1, 0, k, 10, device) for k in range(30)}
    assert times == {False: 5.0, True: 35.0}
    assert {network.compute_s(1, 0, k, 0, device) for k in range(30)} == {0.0}  # a message, and no work


def test_a_chain_has_to_change():
    with pytest.raises(ConfigError, match=r"network.p_bg=0.0 .*stationary"):
        GilbertElliott(p_gb=0.0, p_bg=0.0)


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


def brief(tmp_path, kind: str) -> Network:
    """Clients 0 to 5 with windows of a few ticks."""
    rows = {0: [(3, 5), (5, 9), (12, 13)], 1: [(0, 4)], 2: [(1, 20)], 3: [(0, 6), (16, 20)], 4: [(0, 8), (8, 20)]}
    lines = [f"{c},0,0,,,{a * 1e-6:.6f},{b * 1e-6:.6f}" for c, windows in rows.items() for a, b in windows]
    return {
        "phases": Instant(availability=0.3, availability_period_s=10e-6),
        "nearly": Instant(availability=0.99, availability_period_s=10e-6),
        "once": trace(tmp_path, *lines, "5,0,0,,,,", header=WINDOWS),
        "laps": trace(tmp_path, *lines, "5,0,0,,,,", header=WINDOWS, repeat_s=20e-6),
    }[kind]


@pytest.mark.parametrize("kind", ["phases", "nearly", "once", "laps"])
def test_the_tick_of_leaving_is_the_first_without_the_client(tmp_path, kind):
    network, far = brief(tmp_path, kind), 100
    for client in range(6):
        on = [network.available(0, client, now) for now in range(far)]
        for now in range(far - 45):
            expected = next((t for t in range(now, far) if not on[t]), None)
            assert network.leaves(0, client, now) == expected, (client, now)


def test_always_available_by_default():
    assert all(
        network.available(0, c, now) for network in (Instant(), Lognormal()) for c in range(5) for now in (0, 10**12)
    )


def test_a_trace_gives_each_client_its_device(tmp_path):
    network = trace(tmp_path, "0,0.5,0.1,8,80", "7,1,0,,")
    assert network.device(0, 0, 8) == Device(0.5, 0.1, 80.0, 8.0)
    assert network.device(0, 7, 8) == Device(1.0, 0.0, None, None)
    assert network.available(0, 0, 10**15)


def test_the_order_of_columns_is_free(tmp_path):
    network = trace(tmp_path, "80,8,0.1,0.5,0", header="down_mbps,up_mbps,latency_s,seconds_per_step,client")
    device = network.device(0, 0, 1)
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
        network.device(0, 9, 10)
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
    for name, bad in [
        ("dropout", 1.5), ("latency_s", -1), ("up_mbps", 0), ("availability", 0), ("speed", 3),
        ("rejoin_s", -1), ("on_leave", "stay"), ("server_up_mbps", 0), ("server_down_mbps", 0), ("slow_factor", 0),
        ("slow_clients", 3),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=rf"network\.{name}="):
            build({"_target_": "fl.network.Uniform", name: bad}, "network", Network)
    for kind, name, bad in [
        ("Linear", "spread", 1.0), ("Linear", "spread", -0.1), ("GilbertElliott", "p_gb", 1.1),
        ("GilbertElliott", "p_bg", -0.1), ("GilbertElliott", "slowdown", 0.5),
        ("GilbertElliott", "seconds_per_job", -1),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=rf"network\.{name}="):
            build({"_target_": f"fl.network.{kind}", name: bad}, "network", Network)
    with pytest.raises(ConfigError, match=r"network\.path="):
        build({"_target_": "fl.network.Trace", "path": None, "repeat_s": None, "dropout": 0.0}, "network", Network)


def test_who_is_always_available(tmp_path):
    assert Instant().always_available and Uniform(dropout=0.5).always_available and Linear(rejoin_s=9).always_available
    assert not Uniform(dropout=0.5, rejoin_s=1.0).always_available
    assert not Instant(availability=0.99).always_available
    assert trace(tmp_path, "0,1,0,1,1").always_available
    assert not trace(tmp_path, "0,1,0,1,1", dropout=0.5, rejoin_s=1.0).always_available
    assert not trace(tmp_path, "0,1,0,1,1,0,5", header=WINDOWS).always_available


@pytest.mark.parametrize("path", sorted(Path(configs.__file__).parent.glob("network/*.yaml")), ids=lambda p: p.stem)
def test_every_option_names_every_setting_with_its_default(path):
    assert path.read_text().startswith("# ")
    values = OmegaConf.to_container(OmegaConf.load(path))
    kind = getattr(fl.network, values.pop("_target_").removeprefix("fl.network."))
    assert issubclass(kind, Network)
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.init}
    if path.stem == "cluster":  # an option of values of its own
        assert values.keys() == defaults.keys()
    else:
        assert values == defaults
