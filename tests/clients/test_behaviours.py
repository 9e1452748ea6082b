import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml

from clients.behaviours.base import Behaviour, ReplyFields
from clients.behaviours.faulty import Faulty, InjectedCrash
from clients.behaviours.none import Honest
from fl.config import build
from fl.errors import ConfigError
from fl.keys import generator

ROOT = Path(__file__).parents[2]
KINDS = next(f for f in fields(Faulty) if f.name == "kind").metadata["choices"]


def reply(client: int = 2, round_: int = 5) -> ReplyFields:
    vector = generator(client, round_).normal(size=23).astype(np.float32)
    return ReplyFields(client, round_, 4, "0123456789abcdef", vector, examples=40, steps=5, tokens=900, loss=0.5)


def changes(kind: str, honest: ReplyFields, *key) -> dict:
    """The fields in which the one reply under ``kind`` differs from the honest one."""
    sent = Faulty(kind=kind).apply(honest, *key)
    assert sent is not None
    return {
        f.name: getattr(sent, f.name)
        for f in fields(ReplyFields)
        if not np.array_equal(getattr(sent, f.name), getattr(honest, f.name))
    }


def test_each_kind_changes_what_it_says_and_nothing_else():
    honest = reply()
    one_bad = {kind: changes(kind, honest, 1, 2)["update"] for kind in ("nan", "inf")}
    assert np.isnan(one_bad["nan"]).sum() == 1
    assert np.isinf(one_bad["inf"]).sum() == 1
    for kind in one_bad:
        assert set(changes(kind, honest, 1, 2)) == {"update"}
        kept = np.isfinite(one_bad[kind])
        np.testing.assert_array_equal(one_bad[kind][kept], honest.update[kept])
    assert changes("wrong_shape", honest)["update"].shape == (22,)
    assert changes("oversize", honest)["update"].shape == (16 * 23,)
    huge = changes("huge_norm", honest)
    assert set(huge) == {"update"}
    assert np.isfinite(huge["update"]).all()
    assert np.linalg.norm(huge["update"].astype(float)) == pytest.approx(1e30, rel=1e-6)
    assert changes("wrong_version", honest) == {"version": 5}
    (layout,) = changes("wrong_layout", honest).values()
    assert len(layout) == 16
    assert changes("huge_weight", honest) == {"examples": 10**9}
    assert changes("zero_weight", honest) == {"examples": 0}
    assert Faulty(kind="silent").apply(honest) is None
    with pytest.raises(InjectedCrash, match="client 2 .* round 5"):
        Faulty(kind="crash").apply(honest)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("crash", "silent")])
def test_the_honest_reply_is_left_alone_and_types_are_kept(kind):
    honest = reply()
    before = honest.update.copy()
    sent = Faulty(kind=kind).apply(honest, 1, "key")
    assert sent.update.dtype == np.float32
    assert type(sent.examples) is type(sent.version) is int
    np.testing.assert_array_equal(honest.update, before)


def test_an_update_of_zeros_becomes_huge_too():
    still = ReplyFields(0, 1, 0, "a", np.zeros(4, np.float32), 1, 1, 1, None)
    sent = Faulty(kind="huge_norm").apply(still)
    np.testing.assert_allclose(sent.update, 0.5e30, rtol=1e-6)


def test_draws_come_from_the_key():
    def place(*key):
        return int(np.flatnonzero(np.isnan(changes("nan", reply(), *key)["update"]))[0])

    assert place(1, 7, 3) == place(1, 7, 3)
    assert len({place(1, 7, r) for r in range(20)}) > 3


def test_affected_clients_are_drawn_once_from_the_key():
    fault = Faulty(fraction=0.3)
    chosen = fault.affected(50, 1, "attack")
    assert chosen == fault.affected(50, 1, "attack")
    assert chosen != fault.affected(50, 2, "attack")
    assert len(chosen) == 15
    assert chosen <= set(range(50))
    assert all(type(c) is int for c in chosen)


@pytest.mark.parametrize(
    ("fraction", "number", "count"), [(0.0, 10, 0), (0.01, 10, 1), (0.25, 10, 3), (0.24, 10, 2), (1.0, 10, 10)]
)
def test_a_fraction_is_rounded_to_whole_clients(fraction, number, count):
    assert len(Faulty(fraction=fraction).affected(number, 0)) == count


def test_named_clients_come_before_the_fraction_and_have_to_exist():
    assert Faulty(clients=[3, 1], fraction=1.0).affected(5, 0) == {1, 3}
    assert Faulty(clients=[], fraction=1.0).affected(5, 0) == frozenset()
    with pytest.raises(ConfigError, match=r"attack\.clients=5 .*0 to 4"):
        Faulty(clients=[5]).affected(5, 0)


def test_only_affected_clients_misbehave_and_only_from_their_round():
    fault = Faulty(kind="silent", from_round=5)
    assert fault.act(reply(client=2, round_=5), frozenset({2})) is None
    for honest, affected in ((reply(2, 4), {2}), (reply(2, 5), {1}), (reply(2, 9), set())):
        assert fault.act(honest, frozenset(affected)) is honest


def test_the_honest_one():
    honest = reply()
    assert Honest().affected(10, 0) == frozenset()
    assert Honest().apply(honest) is honest
    assert Honest().act(honest, frozenset({honest.client})) is honest


@pytest.mark.parametrize(("name", "cls"), [("none", Honest), ("faulty", Faulty)])
def test_configs_build_the_defaults(name, cls):
    values = yaml.safe_load((ROOT / "configs" / "attack" / f"{name}.yaml").read_text())
    assert build(values, "attack", Behaviour) == cls()
    assert set(values) - {"_target_"} == {f.name for f in fields(cls) if f.init}


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("kind", "explode", "one of nan, inf"),
        ("fraction", 1.5, "<= 1"),
        ("from_round", -1, ">= 0"),
        ("f", 1, "no such"),
    ],
)
def test_wrong_settings_are_refused_by_name(setting, value, allowed):
    with pytest.raises(ConfigError, match=rf"attack\.{setting}=.*{allowed}"):
        build({"_target_": "clients.behaviours.faulty.Faulty", setting: value}, "attack")


def test_needs_neither_flower_nor_torch():
    code = "import sys, clients.behaviours.faulty, clients.behaviours.none; print({'flwr', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
