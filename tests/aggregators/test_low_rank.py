"""What every rule for low-rank updates is held to: exact, or off by the predicted error; in any order; factored."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from aggregators.base import Aggregator
from aggregators.fedavg import FedAvg
from aggregators.fedex import FedEx
from aggregators.fedsb import FedSB
from aggregators.fedsvd import FedSVD
from aggregators.flexlora import FlexLoRA
from aggregators.flora import FLoRA
from aggregators.hetlora import HetLoRA
from aggregators.rolora import RoLoRA
from aggregators.server_optimizers import SGD, FedAdam
from fl.errors import ConfigError, RunStopped
from fl.keys import generator
from fl.state import ServerState, Update
from tests.oracles import low_rank as oracle

# rule, form of the adapter, round: what should be exact
EXACT = {
    "fedex": (FedEx, "lora", 1),
    "flora": (FLoRA, "lora", 1),
    "fedsb": (FedSB, "core", 1),
    "fedsvd": (FedSVD, "b", 1),
    "fedsvd, no refactoring": (lambda **k: FedSVD(period=100, **k), "b", 1),
    "rolora B": (RoLoRA, "alternating", 1),
    "rolora A": (RoLoRA, "alternating", 2),
}
INEXACT = {
    "fedex, rank 2": (lambda **k: FedEx(rank=2, **k), "lora", 1),
    "flexlora": (FlexLoRA, "lora", 1),
    "flexlora, even": (lambda **k: FlexLoRA(split="even", **k), "lora", 1),
    "hetlora": (HetLoRA, "lora", 1),
    "fedsb, owners": (lambda **k: FedSB(blocks="owners", **k), "core", 1),
}
ALL = EXACT | INEXACT


@st.composite
def cases(draw):
    """Ranks and alphas of the clients, weights (some of them zero), which module does not vary, and a seed."""
    number = draw(st.integers(1, 12))
    kinds = draw(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1.0, 3.0, 16.0])), min_size=1, max_size=4))
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=number, max_size=number).filter(any))
    return number, kinds, weights, draw(st.sampled_from([None, 0])), draw(st.integers(0, 10**6))


def build(case, form: str, round: int) -> tuple[ServerState, list[Update], np.ndarray]:
    number, kinds, weights, fixed, seed = case
    space = oracle.space_of(form, [r for r, _ in kinds], [a for _, a in kinds], fixed=fixed)
    server = oracle.server_of(space, seed)
    return server, oracle.updates_of(server, number, seed, round), np.array(weights) / sum(weights)


def close(server, updates, shares, new) -> bool:
    """Whether ``increment + delta(new) = D*``, to rounding."""
    off = oracle.norm(oracle.error(server, updates, shares, new))
    return off <= 1e-12 * (1 + oracle.norm(oracle.mean_delta(server, updates, shares)))


def head(server: ServerState, vector: np.ndarray) -> np.ndarray:
    return vector[server.space.columns(["head"])]


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_the_new_state_is_the_mean_of_the_weight_changes(name, case):
    rule, form, round = EXACT[name]
    server, updates, shares = build(case, form, round)
    new = rule(weights=case[2]).aggregate(server, updates)
    assert close(server, updates, shares, new)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_a_head_is_the_mean(name, case):
    rule, form, round = ALL[name]
    server, updates, shares = build(case, form, round)
    new = rule(weights=case[2]).aggregate(server, updates)
    if name == "hetlora":
        return  # weighs by the norms too: see its own tests
    expected = head(server, oracle.mean_state(server, updates, shares))
    np.testing.assert_allclose(head(server, new.vector), expected, atol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_fedit_s_error_is_the_covariance(case):
    """HetLoRA without its norms is FedIT for mixed ranks; with equal ranks it is FedAvg."""
    server, updates, shares = build(case, "lora", 1)
    new = HetLoRA(weights=case[2], sparsity_weighted=False).aggregate(server, updates)
    off, expected = oracle.error(server, updates, shares, new), oracle.covariance(server, updates, shares)
    for layer in off:
        np.testing.assert_allclose(off[layer], -expected[layer], atol=1e-11)
    if not server.space.mixed:
        np.testing.assert_allclose(new.vector, FedAvg(weights=case[2]).aggregate(server, updates).vector, atol=1e-13)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_truncated_rules_miss_the_tail_of_the_singular_values(case):
    server, updates, shares = build(case, "lora", 1)
    target, residual = oracle.mean_delta(server, updates, shares), oracle.covariance(server, updates, shares)
    for rank in (1, 3):
        off = oracle.error(server, updates, shares, FedEx(weights=case[2], rank=rank).aggregate(server, updates))
        for layer, matrix in off.items():
            assert np.linalg.norm(matrix) == pytest.approx(oracle.tail(residual[layer], rank), abs=1e-11)
    for split in ("B", "even"):
        off = oracle.error(server, updates, shares, FlexLoRA(weights=case[2], split=split).aggregate(server, updates))
        full = server.space.modules[0].rank
        for layer, matrix in off.items():
            assert np.linalg.norm(matrix) == pytest.approx(oracle.tail(target[layer], full), abs=1e-10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ranks", [(3,), (2, 3, 1)])
def test_all_the_weight_on_one_client_returns_its_change(name, ranks):
    rule, form, round = ALL[name]
    server = oracle.server_of(oracle.space_of(form, ranks, [4.0] * len(ranks)))
    updates = oracle.updates_of(server, 5, 3, round)
    for chosen in (0, 2):
        weights = [float(c == chosen) for c in range(5)]
        new = rule(weights=weights).aggregate(server, updates)
        if name == "fedsb, owners" and len(ranks) > 1:  # its block is the client's, and what it lacks stays
            own = server.space.columns(["R"], chosen)
            np.testing.assert_allclose(new.vector[own], oracle.client_state(server, updates[chosen])[own], atol=1e-14)
            continue
        assert close(server, updates, weights, new)
        np.testing.assert_allclose(
            head(server, new.vector), head(server, oracle.client_state(server, updates[chosen])), atol=1e-14
        )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ranks", [(3,), (2, 3, 1)])
def test_the_order_of_arrival_changes_no_bit(name, ranks):
    rule, form, round = ALL[name]
    server = oracle.server_of(oracle.space_of(form, ranks, [4.0] * len(ranks)), dtype=np.float32)
    updates = oracle.updates_of(server, 9, 5, round)
    expected = rule().aggregate(server, updates)
    for trial in range(3):
        order = generator(trial, "order").permutation(len(updates))
        new = rule().aggregate(server, [updates[i] for i in order])
        assert new.vector.tobytes() == expected.vector.tobytes()
        assert list(new.increment) == list(expected.increment)
        for layer, piece in new.increment.items():
            assert piece.left.tobytes() == expected.increment[layer].left.tobytes()
            assert piece.right.tobytes() == expected.increment[layer].right.tobytes()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ranks", [(3,), (2, 3, 1)])
def test_it_is_pure_keeps_the_type_and_counts_the_version(name, ranks):
    rule, form, round = ALL[name]
    server = oracle.server_of(oracle.space_of(form, ranks, [4.0] * len(ranks)), dtype=np.float32)
    updates = oracle.updates_of(server, 4, 5, round)
    arrays = [server.vector, *(u.vector for u in updates)]
    before = [a.copy() for a in arrays]
    new = rule().aggregate(server, updates)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert (new.version, new.vector.dtype) == (server.version + 1, np.float32)
    assert all(a.dtype == np.float32 for piece in new.increment.values() for a in (piece.left, piece.right))
    assert not np.shares_memory(new.vector, server.vector)


@pytest.mark.parametrize("name", EXACT)
def test_float32_states_are_exact_to_their_rounding(name):
    rule, form, round = EXACT[name]
    server = oracle.server_of(oracle.space_of(form, (2, 3), (4.0, 1.0)), dtype=np.float32)
    updates = oracle.updates_of(server, 6, 2, round)
    rule = rule()
    new, shares = rule.aggregate(server, updates), rule.shares(updates)
    off = oracle.norm(oracle.error(server, updates, shares, new))
    assert off < 2e-6 * oracle.norm(oracle.mean_delta(server, updates, shares))


@pytest.mark.parametrize("name", ["fedex", "flora", "flexlora", "fedex, rank 2"])
def test_a_client_that_started_from_an_older_vector_counts_with_its_own_end(name):
    rule, form, round = ALL[name]
    server = oracle.server_of(oracle.space_of(form, (3, 2), (4.0, 4.0)))
    updates = oracle.updates_of(server, 3, 2, round)
    old = generator(8, "older").normal(size=server.layout.size)
    late = Update(**{**vars(updates[1]), "start": old})
    mixed = [updates[0], late, updates[2]]
    new = rule().aggregate(server, mixed)
    off = oracle.norm(oracle.error(server, mixed, rule().shares(mixed), new))
    if name in ("fedex", "flora"):
        assert off < 1e-11
    else:
        fresh = rule().aggregate(server, updates)
        assert oracle.norm(oracle.error(server, mixed, rule().shares(mixed), fresh)) > off


@pytest.mark.parametrize("name", ["rolora B", "rolora A", "fedsb"])
def test_an_optimizer_moves_along_the_mean(name):
    """Plain averaging half way: the step is half as long. And what an adaptive one remembers stays in its columns."""
    rule, form, _ = ALL[name]
    server = oracle.server_of(oracle.space_of(form, (2, 3), (4.0, 1.0)))
    memory = {}
    for round in (1, 2, 3):
        updates = oracle.updates_of(server, 6, round, round)
        whole = rule().aggregate(server, updates)
        half = rule().aggregate(server, updates, SGD(lr=0.5))
        np.testing.assert_allclose(half.vector - server.vector, 0.5 * (whole.vector - server.vector), atol=1e-14)
        server = rule().aggregate(server, updates, FedAdam())
        for key, array in server.optimizer.items():
            memory.setdefault(key, []).append(len(array))
    phases = 2 if form == "alternating" else 1
    assert len(memory) == 2 * phases
    assert all(len(set(sizes)) == 1 for sizes in memory.values())


@pytest.mark.parametrize("ranks", [(3,), (2, 3)])
def test_hetlora_keeps_one_memory_whoever_is_heard(ranks):
    server = oracle.server_of(oracle.space_of("lora", ranks, [4.0] * len(ranks)))
    updates = oracle.updates_of(server, 6)
    for heard in (updates, updates[1::2], updates[::2], updates):
        server = HetLoRA().aggregate(server, heard, FedAdam())
    assert set(server.optimizer) == {"m", "v"}
    assert len(server.optimizer["m"]) == server.layout.size


@pytest.mark.parametrize("name", ALL)
def test_nothing_to_combine_stops_the_run(name):
    rule, form, _ = ALL[name]
    with pytest.raises(RunStopped):
        rule().aggregate(oracle.server_of(oracle.space_of(form)), [])


@pytest.mark.parametrize("rule", [FedEx(), FLoRA(), FlexLoRA(), FedSVD()])
def test_rules_that_set_the_factors_refuse_a_server_optimizer(rule: Aggregator):
    class Fake:
        form, mixed_ranks = rule.takes[0], True

    rule.check(Fake(), SGD())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"server_optimizer='FedAdam'.*{type(rule).__name__} sets the factors"):
        rule.check(Fake(), FedAdam())  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [FedEx(), FLoRA(), FlexLoRA(), HetLoRA(), FedSB(), FedSVD(), RoLoRA()])
@pytest.mark.parametrize("form", ["lora", "b", "alternating", "core", "slice", "gated", "other"])
def test_an_adapter_of_another_form_is_refused_by_name(rule: Aggregator, form: str):
    class Fake:
        mixed_ranks = True

    Fake.form = form  # type: ignore[attr-defined]
    if form in rule.takes:
        rule.check(Fake(), SGD())  # type: ignore[arg-type]
    else:
        with pytest.raises(ConfigError, match=f"aggregator='{type(rule).__name__}'.*which Fake is not"):
            rule.check(Fake(), SGD())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALL)
def test_no_matrix_of_the_size_of_the_weights_is_built(name):
    """32 clients of rank 16 at 8192 x 8192, where a float64 matrix takes 512 MiB. Torch's memory is not traced."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            tensors = [out] if isinstance(out, torch.Tensor) else [t for t in out if isinstance(t, torch.Tensor)]
            largest = max(largest, *(t.numel() for t in tensors))
            return out

    rule, form, round = ALL[name]
    size, rank, clients = 8192, 16, 32
    server = oracle.server_of(oracle.space_of(form, (rank,), (16.0,), ((size, size),), head=False), dtype=np.float32)
    updates = oracle.updates_of(server, clients, 0, round)
    tracemalloc.start()
    with Sizes():
        new = rule().aggregate(server, updates)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size * size * 8 / 2
    assert largest <= size * clients * rank
    assert all(piece.right is not None for piece in new.increment.values())
