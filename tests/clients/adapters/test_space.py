"""Groups, phases, leading blocks and scales of a state, and the weight change that it stands for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clients.adapters.bra import BRA
from clients.adapters.ffa import FFA
from clients.adapters.lora import Factors, LoRA
from clients.adapters.rolora import RoLoRA
from clients.adapters.space import Module, Space
from clients.layout import Layout
from tests.oracles.low_rank_cohort import build, change, own, vector

MIXED = {
    "lora": LoRA(rank=[3, 1, 2], alpha=[6.0, 5.0, 1.0]),
    "lora of one alpha": LoRA(rank=[1, 4], alpha=6.0),
    "lora of one rank": LoRA(rank=[3, 3], alpha=[2.0, 9.0]),
    "rslora": LoRA(rank=[2, 4], alpha=[3.0, 5.0], rslora=True),
    "ffa": FFA(rank=[2, 3], alpha=4.0),
    "rolora": RoLoRA(rank=[4, 2, 3], alpha=[1.0, 2.0, 3.0]),
    "lora_xs": BRA(rank=[1, 3], alpha=[2.0, 7.0]),
}
ADAPTERS = {**MIXED, "lora alike": LoRA(rank=3, alpha=5.0), "lora_xs alike": BRA(rank=4, alpha=2.0)}


def some_groups(space: Space) -> list[tuple[str, ...] | None]:
    return [None, *((g,) for g in space.names), space.names[:2], *space.phases]


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_lift_undoes_take_for_every_client_and_group(family, name):
    cohort = build(family, ADAPTERS[name])
    space, server = cohort.space, vector(cohort)
    for client in (None, 0, 1, 2, 5):
        for groups in some_groups(space):
            columns = space.columns(groups, client)
            mine = space.take(server, groups, client)
            assert mine.shape == columns.shape and mine.dtype == server.dtype
            np.testing.assert_allclose(space.lift(mine, groups, client), server[columns], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_what_a_client_takes_is_its_leading_block_in_its_own_scale(family, name):
    """Cut and scaled by hand from named tensors, then laid flat."""
    adapter = MIXED[name]
    cohort = build(family, adapter)
    space, server = cohort.space, vector(cohort)
    for client in range(4):
        expected = own(adapter, space, server, client)
        flat = torch.cat([expected[n].reshape(-1) for n in space.layout.names]).numpy()
        np.testing.assert_allclose(space.take(server, None, client), flat, rtol=1e-14, atol=0)
        sizes = {n: t.numel() for n, t in expected.items()}
        for group in space.names:
            wanted = sum(sizes[n] for n, g in zip(space.layout.names, space.groups, strict=True) if g == group)
            assert len(space.columns((group,), client)) == wanted


@pytest.mark.parametrize("name", MIXED)
def test_a_clients_own_product_in_its_own_scale_is_the_leading_block_of_the_servers(name):
    adapter = MIXED[name]
    cohort = build("bert", adapter)
    space, server = cohort.space, vector(cohort)
    for client in range(3):
        rank, scale = (values[client % len(adapter.ranks)] for values in (adapter.ranks, adapter.scalings))
        mine = change(space, own(adapter, space, server, client), scale)
        blocked = np.zeros_like(server)
        columns = space.columns(None, client)
        blocked[columns] = server[columns]
        for low in space.delta(blocked):
            module = next(m for m in space.modules if m.name == low.name)
            assert space.rank(module, client) == rank and space.scale(module, client) == scale
            np.testing.assert_allclose(low.left @ low.right, mine[low.name].numpy(), rtol=1e-12, atol=1e-15)
            assert np.abs(mine[low.name].numpy()).max() > 1e-4


def test_delta_is_dense_algebra_with_matrix_core_gate_or_none():
    rng = np.random.default_rng(0)
    for core in (None, (2, 2), (2,)):
        shapes = {"a": (2, 5), "b": (3, 2), **({"core": core} if core else {}), "head": (4,)}
        layout = Layout(tuple(shapes), tuple(shapes.values()))
        space = Space(layout, modules=(Module("m", "a", "b", 1.5, 2, "core" if core else None),))
        state = rng.normal(size=layout.size).astype(np.float32)
        (low,) = space.delta(state)
        tensors = {n: t.double().numpy() for n, t in layout.views(torch.from_numpy(state)).items()}
        middle = np.eye(2) if core is None else tensors["core"] if len(core) == 2 else np.diag(tensors["core"])
        np.testing.assert_allclose(low.left @ low.right, 1.5 * tensors["b"] @ middle @ tensors["a"], rtol=1e-12)
        assert low.left.dtype == low.right.dtype == np.float64 and low.left.shape == (3, 2)
        assert space.sizes(space.modules[0]) == (3, 5)


def test_columns_are_kept_so_that_equal_questions_have_one_answer():
    space = build("bert", MIXED["lora"]).space
    assert space.columns(("A", "B"), 1) is space.columns(("B", "A"), 4)  # clients 1 and 4 are alike
    assert space.columns(None) is space.columns(space.names, None)
    assert space.columns(("A",), 1) is not space.columns(("A",), 2)
    assert not space.columns(None).flags.writeable
    assert space.units(1) is space.units(4) and space.units(0) is None and space.units(None) is None
    alike = build("bert", ADAPTERS["lora alike"]).space
    assert alike.columns(("B",), 0) is alike.columns(("B",), 7) is alike.columns(("B",))


@pytest.mark.parametrize("name", ADAPTERS)
def test_columns_rise_and_those_of_the_groups_make_up_the_whole(name):
    space = build("bert", ADAPTERS[name]).space
    for client in (None, 0, 1, 2):
        parts = [space.columns((g,), client) for g in space.names]
        whole = space.columns(None, client)
        assert np.array_equal(np.sort(np.concatenate(parts)), whole) and (np.diff(whole) > 0).all()
    assert np.array_equal(space.columns(None), np.arange(space.layout.size))
    assert len(space.columns(())) == 0


def test_modules_with_a_rank_or_alpha_of_their_own_are_the_same_for_all_clients():
    adapter = LoRA(
        rank=[4, 2], alpha=[8.0, 2.0], rank_pattern={"query": 3}, alpha_pattern={"1.intermediate.dense": 5.0}
    )
    cohort = build("bert", adapter)
    space, server = cohort.space, vector(cohort)
    seen = set()
    for module, a, b, _ in space.factors(server):
        seen.add((module.varies, module.rank))
        owned = [space.rank(module, c) for c in (None, 0, 1)]
        scales = [space.scale(module, c) for c in (None, 0, 1)]
        assert a.shape[0] == b.shape[1] == module.rank
        if module.name.endswith("query"):
            assert not module.varies and owned == [3, 3, 3] and scales == pytest.approx([8 / 3] * 3)
        elif "layer.1" in module.name:
            assert not module.varies and owned == [4, 4, 4] and scales == [5 / 4] * 3
        else:
            assert module.varies and owned == [4, 4, 2] and scales == [2.0, 2.0, 1.0]
    assert seen == {(False, 3), (False, 4), (True, 4)}
    for client in (0, 1):
        mine = space.take(server, None, client)
        np.testing.assert_allclose(
            space.lift(mine, None, client), server[space.columns(None, client)], rtol=1e-14, atol=0
        )
    kept = build("bert", LoRA(rank=4, alpha=8.0, rank_pattern=adapter.rank_pattern)).space
    assert kept.layout == space.layout and not kept.mixed


@pytest.mark.parametrize(
    ("adapter", "phases"),
    [
        (LoRA(rank=2), [("A", "B", "head")]),
        (FFA(rank=2), [("B", "head")]),
        (RoLoRA(rank=2), [("B", "head"), ("A", "head")]),
        (BRA(rank=2), [("R", "head")]),
        (FFA(rank=2, train_head=False), [("B",)]),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Factors) else "",
)
def test_what_trains_in_which_round(adapter, phases):
    space = build("bert", adapter).space
    for round in range(1, 6):
        assert space.trains(round) == phases[(round - 1) % len(phases)]
    assert space.constant == (len(phases) > 1 or set(phases[0]) != set(space.names))
    assert space.trainable == max(len(space.columns(p)) for p in phases)
    assert space.trainable < space.layout.size or isinstance(adapter, LoRA)


def test_core_trains_r_squared_numbers_a_module_whatever_its_size():
    space = build("bert", BRA(rank=4, train_head=False)).space
    assert space.trainable == 16 * len(space.modules)
    assert {space.sizes(m) for m in space.modules} == {(24, 24), (40, 24)}


def test_a_space_without_factors_is_one_group_that_always_trains():
    space = Space(Layout(("x", "y"), ((2, 3), (4,))))
    assert space.names == ("adapter",) == space.trains(1) == space.trains(9) and not space.constant and not space.mixed
    server = np.arange(10, dtype=np.float32)
    assert np.array_equal(space.take(server, None, 3), server) and space.units(3) is None
    assert list(space.delta(server)) == []


def test_sublayouts_hold_whole_tensors_in_order():
    space = build("bert", MIXED["rolora"]).space
    layout = space.sublayout(("B", "head"))
    assert layout.size == len(space.columns(("B", "head")))
    assert [n for n in space.layout.names if n in layout.names] == list(layout.names)


def test_take_rounds_to_the_vectors_type_and_lift_too():
    adapter = LoRA(rank=[3, 1], alpha=[6.0, 5.0])
    cohort = build("bert", adapter)
    server = vector(cohort).astype(np.float32)
    mine = cohort.space.take(server, None, 1)
    assert mine.dtype == cohort.space.lift(mine, None, 1).dtype == np.float32
    np.testing.assert_allclose(cohort.space.lift(mine, None, 1), server[cohort.space.columns(None, 1)], rtol=3e-7)


def test_an_embedding_is_a_module_of_one_hot_tokens():
    space = build("llama", LoRA(rank=3, alpha=5.0, target_modules=["embed_tokens"])).space
    (module,) = space.modules
    assert space.sizes(module) == (24, 61) and module.scale == pytest.approx(5 / 3)
    assert math.prod(space.shape(module.a)) == 3 * 61
