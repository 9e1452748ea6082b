"""The gauge attack: another basis of the same weight change."""

from types import SimpleNamespace

import numpy as np
import pytest

from clients.adapters.ffa import FFA
from clients.adapters.lora import LoRA
from clients.adapters.sora import SoRA
from clients.adapters.space import Space
from clients.behaviours.base import Facts, ReplyFields, Scene
from clients.behaviours.gauge import Gauge
from clients.layout import Layout
from fl.errors import ConfigError, ShoalError
from fl.keys import generator
from tests.oracles.low_rank import space_of

KINDS = ("scale", "rotation")


def trained(space: Space, client: int, round_: int = 4) -> tuple[ReplyFields, np.ndarray, np.ndarray]:
    """A client's honest reply, the state that it started from, and the columns that it trained."""
    columns = space.columns(space.trains(round_), client)
    start = generator("start", client).normal(0, 0.3, len(columns)).astype(np.float32)
    update = generator("update", client).normal(0, 0.05, len(columns)).astype(np.float32)
    return ReplyFields(client, round_, 1, "l", update, 10, 2, 30, 0.5), start, columns


def scene(space: Space, said, starts, columns, **more) -> Scene:
    return Scene(3, 9, space, 0.1, {said.client: starts}, {said.client: columns}, **more)


def tensors(space: Space, client: int, state: np.ndarray, columns: np.ndarray) -> dict[str, np.ndarray]:
    """The client's tensors in float64, cut out of its columns one index at a time."""
    values = dict(zip(columns.tolist(), state.astype(np.float64).tolist(), strict=True))
    out = {}
    for name in space.layout.names:
        places = np.arange(*space.spans[name]).reshape(space.shape(name))[space.block(name, client)]
        if set(places.ravel().tolist()) <= set(values):
            out[name] = np.array([values[i] for i in places.ravel().tolist()]).reshape(places.shape)
    return out


def differ(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [(3,), (2, 5)], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize("client", [0, 1])
def test_the_product_stays_and_the_factors_do_not(kind, ranks, client):
    space = space_of(ranks=ranks, alphas=(5.0,) * len(ranks))
    honest, start, columns = trained(space, client)
    before = start.copy(), honest.update.copy()
    (sent,) = Gauge(kind=kind, gain=50.0).replies([honest], frozenset({client}), scene(space, honest, start, columns))
    assert sent.update.dtype == np.float32
    np.testing.assert_array_equal(start, before[0])
    np.testing.assert_array_equal(honest.update, before[1])
    was = tensors(space, client, start + honest.update, columns)
    now = tensors(space, client, start + sent.update, columns)
    for module in space.modules:
        assert now[module.b].shape[1] == space.rank(module, client)
        assert differ(now[module.b] @ now[module.a], was[module.b] @ was[module.a]) < 1e-5
        if kind == "scale":
            np.testing.assert_allclose(now[module.b], 50 * was[module.b], rtol=1e-5)
            np.testing.assert_allclose(now[module.a], was[module.a] / 50, rtol=1e-3, atol=1e-7)
        else:
            for name in (module.a, module.b):
                assert np.linalg.norm(now[name]) == pytest.approx(np.linalg.norm(was[name]), rel=1e-5)
                assert differ(now[name], was[name]) > 0.3
    for name in ("head.weight", "head.bias"):
        np.testing.assert_array_equal(now[name], was[name])
    # Of two honest updates of this size the factors differ by a twentieth of that.
    assert np.linalg.norm(sent.update) > 5 * np.linalg.norm(honest.update)


def test_each_client_round_and_module_has_a_basis_of_its_own():
    space = space_of(sizes=((7, 7), (7, 7)))
    size = space.layout.size
    states = np.tile(generator("s").normal(size=size), (2, 1))

    def turn(round_, sent):
        a = [space.tensor(row, m.a) for row in sent for m in space.modules]
        was = [space.tensor(row, m.a) for row in states for m in space.modules]
        return [np.linalg.lstsq(x.T, y.T, rcond=None)[0].T for x, y in zip(was, a, strict=True)]

    found = []
    for round_ in (1, 2):
        facts = Facts(3, round_, (4, 5), states=True, space=space)
        sent = Gauge(kind="rotation").craft(states[:0], states, facts)
        np.testing.assert_array_equal(sent, Gauge(kind="rotation").craft(states[:0], states, facts))
        found += turn(round_, sent)
    for matrix in found:
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-9)
    assert len({matrix.round(6).tobytes() for matrix in found}) == 8


def test_among_peers_the_state_itself_is_turned():
    space = space_of()
    states = generator("s").normal(size=(2, space.layout.size))
    sent = Gauge(gain=4.0).craft(states[:0], states, Facts(3, 1, (0, 1), states=True, space=space))
    for row, was in zip(sent, states, strict=True):
        for module in space.modules:
            np.testing.assert_allclose(space.tensor(row, module.b), 4 * space.tensor(was, module.b))
            np.testing.assert_allclose(space.tensor(row, module.a), space.tensor(was, module.a) / 4)
        np.testing.assert_array_equal(row[-15:], was[-15:])


def test_factors_of_a_convolution_are_turned_as_matrices():
    layout = Layout(("c.A", "c.B"), ((2, 3, 2, 2), (5, 2, 1, 1)))
    space = space_of(sizes=((5, 12),), ranks=(2,), head=False)
    module = type(space.modules[0])("c", "c.A", "c.B", 1.0, 2)
    space = Space(layout, ("A", "B"), (("A", "B"),), (module,))
    state = generator("c").normal(size=(1, layout.size))
    sent = Gauge(kind="rotation").craft(state[:0], state, Facts(3, 1, (0,), states=True, space=space))

    def product(v):
        return space.tensor(v, "c.B").reshape(5, 2) @ space.tensor(v, "c.A").reshape(2, 12)

    np.testing.assert_allclose(product(sent[0]), product(state[0]), atol=1e-12)
    assert differ(sent[0], state[0]) > 0.1


@pytest.mark.parametrize("form", ["b", "alternating", "core"])
def test_factors_that_do_not_train_together_are_refused_in_the_reply_s_place(form):
    space = space_of(form)
    honest, start, columns = trained(space, 0)
    (sent,) = Gauge().replies([honest], frozenset({0}), scene(space, honest, start, columns))
    assert isinstance(sent, ShoalError)
    assert "does not train here. Use adapter=lora" in str(sent)


def test_what_it_needs_is_said():
    space = space_of()
    honest, start, columns = trained(space, 0)
    (sent,) = Gauge().replies([honest], frozenset({0}), Scene(3, 9, space))
    assert "states that the updates start from" in str(sent)
    plain = Space(Layout(("w",), ((len(columns),),)))
    (sent,) = Gauge().replies([honest], frozenset({0}), scene(plain, honest, start, None))
    assert "has none. Use adapter=lora" in str(sent)
    assert isinstance(sent, ShoalError)


def settings(**parts):
    return SimpleNamespace(schedule=SimpleNamespace(in_rounds=False, decentral=False), **parts)


def test_settings_that_can_not_go_with_it_are_refused_before_anything_loads():
    for adapter in (LoRA(), LoRA(rank=[2, 4], alpha=8.0)):
        Gauge(kind="rotation").check(settings(adapter=adapter))
    Gauge().check(settings(adapter=SoRA()))
    with pytest.raises(ConfigError, match=r"adapter='FFA'.*adapter=lora"):
        Gauge().check(settings(adapter=FFA()))
    with pytest.raises(ConfigError, match=r"adapter='LoRA'"):
        Gauge().check(settings(adapter=LoRA(dora=True)))
    with pytest.raises(ConfigError, match=r"attack\.kind='rotation'.*gate"):
        Gauge(kind="rotation").check(settings(adapter=SoRA()))
