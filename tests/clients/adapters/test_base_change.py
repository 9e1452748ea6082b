"""Changes of the base in factored form: sums, the form that takes fewer numbers, and the flat vector that travels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.adapters.base_change import Change, Piece, compact, grow, numbers, pack, packed_size, unpack
from clients.adapters.bra import BRA
from clients.adapters.lora import LoRA
from clients.cohort import Cohort, CohortBatch
from fl.errors import ConfigError
from tests.oracles.cohorts import apart
from tests.oracles.low_rank_cohort import build, gradients, loss, vector
from tests.oracles.models import FAMILIES, batches, tiny

MODULES = ["q", "v", "up"]
SHAPES = [(7, 5), (4, 4), (6, 11)]
SHAPE = dict(zip(MODULES, SHAPES, strict=True))


def piece(name: str, rank: int, seed: int = 0, dtype: type = np.float64) -> Piece:
    d, k = SHAPE[name]
    rng = np.random.default_rng([seed, rank + 1, d])
    if rank < 0:
        return Piece(rng.normal(size=(d, k)).astype(dtype), None)
    return Piece(rng.normal(size=(d, rank)).astype(dtype), rng.normal(size=(rank, k)).astype(dtype))


def dense(change: Change) -> dict[str, np.ndarray]:
    return {
        name: (change[name].matrix() if name in change else np.zeros(SHAPE[name])).astype(np.float64)
        for name in MODULES
    }


def random_change(rng: np.random.Generator, seed: int) -> dict[str, Piece]:
    some = [name for name in MODULES if rng.random() < 0.7]
    return {name: piece(name, int(rng.choice([-1, 1, 2, 3])), seed) for name in some}


@pytest.mark.parametrize("seed", range(8))
def test_growing_is_the_dense_sum_whatever_the_forms(seed):
    rng = np.random.default_rng(seed)
    total: Change = {}
    expected = {name: np.zeros(shape) for name, shape in SHAPE.items()}
    for step in range(6):
        more = random_change(rng, 100 * seed + step)
        before = {name: (p.left.copy(), None if p.right is None else p.right.copy()) for name, p in total.items()}
        new = grow(total, more)
        for name, (left, right) in before.items():  # what was there is left as it was
            assert np.array_equal(total[name].left, left)
            assert right is None or np.array_equal(total[name].right, right)
        total = new
        expected = {name: expected[name] + change for name, change in zip(MODULES, dense(more).values(), strict=True)}
        for name, found in dense(total).items():
            np.testing.assert_allclose(found, expected[name], rtol=1e-12, atol=1e-12)


def test_factors_side_by_side_are_exact():
    """No bit of them is changed: their sum is put off until somebody multiplies."""
    first, second = piece("up", 1, 1, np.float32), piece("up", 2, 2, np.float32)
    total = grow({"up": first}, {"up": second})["up"]
    assert total.rank == 3 and total.right is not None
    assert np.array_equal(total.left, np.concatenate([first.left, second.left], axis=1))
    assert np.array_equal(total.right, np.concatenate([first.right, second.right], axis=0))


@pytest.mark.parametrize(("name", "most"), [("q", 2), ("v", 2), ("up", 3)])
def test_factors_become_a_matrix_where_that_takes_fewer_numbers(name, most):
    """``r (d + k) > d k``: above 35/12, 16/8 and 66/17; equal numbers stay factors."""
    d, k = SHAPE[name]
    for rank in range(1, 6):
        found = compact(piece(name, rank))
        assert (found.right is None) == (rank > most) == (rank * (d + k) > d * k)
        assert found.rank == (-1 if rank > most else rank) and found.numbers <= d * k
        assert np.array_equal(found.matrix(), piece(name, rank).matrix())
    total: Change = {}
    for step in range(6):
        total = grow(total, {name: piece(name, 1, step)})
        assert (total[name].right is None) == (step + 1 > most)
    assert compact(piece(name, -1)).right is None


def test_the_order_of_memory_changes_no_bit():
    """A server's factors may be transposed views; a client's come from a flat vector. Both have to hold the same."""
    for name in MODULES:
        for rank in (1, 2, 4, 5):
            mine = piece(name, rank, dtype=np.float32)
            assert mine.right is not None
            turned = Piece(np.asfortranarray(mine.left), np.asfortranarray(mine.right))
            twice = [grow(grow({}, {name: p}), {name: p})[name] for p in (mine, turned)]
            assert np.array_equal(twice[0].left, twice[1].left)
            assert twice[0].right is None or np.array_equal(twice[0].right, twice[1].right)


def test_growing_with_nothing_changes_nothing():
    total = {"q": piece("q", 2)}
    assert grow(total, {}) == total == grow({}, total) and grow({}, {}) == {}


@pytest.mark.parametrize("seed", range(6))
def test_packing_and_unpacking_give_the_same_pieces_back(seed):
    rng = np.random.default_rng(seed)
    change = {n: Piece(p.left.astype(np.float32), None if p.right is None else p.right.astype(np.float32))
              for n, p in random_change(rng, seed).items()}  # fmt: skip
    vector, ranks = pack(change, MODULES)
    assert ranks == [change[n].rank if n in change else 0 for n in MODULES]
    assert vector.ndim == 1 and len(vector) == packed_size(ranks, SHAPES) == numbers(change)
    back = unpack(vector, ranks, MODULES, SHAPES)
    assert back.keys() == change.keys()
    for name, mine in change.items():
        assert np.array_equal(back[name].left, mine.left) and back[name].rank == mine.rank
        assert mine.right is None or np.array_equal(back[name].right, mine.right)
        assert np.shares_memory(back[name].left, vector)


def test_no_change_is_no_numbers():
    vector, ranks = pack({}, MODULES)
    assert len(vector) == 0 and vector.dtype == np.float32 and ranks == [0, 0, 0]
    assert unpack(vector, ranks, MODULES, SHAPES) == {} and numbers({}) == 0


def test_packing_takes_any_order_of_memory_and_of_modules():
    change = {n: Piece(np.asfortranarray(p.left), p.right) for n, p in [("up", piece("up", 2)), ("q", piece("q", -1))]}
    vector, ranks = pack(change, MODULES)
    assert ranks == [-1, 0, 2]
    for name, found in unpack(vector, ranks, MODULES, SHAPES).items():
        np.testing.assert_array_equal(found.matrix(), change[name].matrix())


@pytest.mark.parametrize("length", [0, 1, 11, 13, 35, 10**4])
def test_a_vector_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match=f"{length} numbers can't be a change"):
        unpack(np.zeros(length), [1, 0, 0], MODULES, SHAPES)


@pytest.mark.parametrize("ranks", [[1], [1, 0, 0, 0]])
def test_as_many_ranks_as_modules_are_needed(ranks):
    with pytest.raises(ValueError, match="zip"):
        unpack(np.zeros(12), ranks, MODULES, SHAPES)


def test_a_change_of_a_module_that_is_not_adapted_is_refused():
    with pytest.raises(ValueError, match="a change of other"):
        pack({"other": piece("q", 1)}, MODULES)


# A cohort over a changed base


def weights_of(cohort: Cohort, seed: int) -> dict[str, Piece]:
    """A change of all modules but the first: factors, matrices, in turn; float64."""
    found = {}
    for number, module in enumerate(cohort.space.modules[1:]):
        d, k = cohort.space.sizes(module)
        rng = np.random.default_rng([seed, number])
        if number % 2:
            found[module.name] = Piece(0.2 * rng.normal(size=(d, k)), None)
        else:
            found[module.name] = Piece(0.2 * rng.normal(size=(d, 2)), rng.normal(size=(2, k)))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [LoRA(rank=3, alpha=5.0), BRA(rank=2, alpha=5.0)], ids=lambda a: type(a).__name__)
def test_a_loaded_change_is_as_good_as_changed_weights(family, adapter):
    """Several slots, linear layers and GPT-2's transposed ones; another change replaces it, none takes it back."""
    cohort = build(family, adapter)
    space, groups = cohort.space, cohort.space.names
    data = batches(cohort.task, [3, 1, 2])
    states = torch.from_numpy(np.stack([vector(cohort, seed) for seed in range(3)]))
    base = tiny(family, dtype=torch.float64)[0].module
    plain = cohort.gradients(states, CohortBatch.of(data))[1]
    for seed in (1, 2):
        change = weights_of(cohort, seed)
        cohort.load_base(change)
        losses, grads = cohort.gradients(states, CohortBatch.of(data))
        more = {name: torch.from_numpy(p.matrix()) for name, p in change.items()}
        for slot in range(3):
            tensors = space.layout.views(states[slot])
            alone = gradients(base, space, tensors, groups, data[slot], more=more)
            assert apart(grads[slot], torch.cat([alone[n].reshape(-1) for n in alone])) <= 1e-9
            assert losses[slot].item() == pytest.approx(loss(base, space, tensors, data[slot], more=more).item())
        assert apart(grads, plain) > 0.01
        columns = torch.from_numpy(space.columns(space.trains(1)).copy())
        with cohort.training(space.trains(1), states[0]):
            _, some = cohort.gradients(states[:1, columns], CohortBatch.of(data[:1]))
        assert apart(some[0], grads[0, columns]) <= 1e-10
    cohort.load_base({})
    assert torch.equal(cohort.gradients(states, CohortBatch.of(data))[1], plain)


def test_a_change_of_a_layer_that_cant_take_it_is_refused_not_lost():
    cohort = build("llama", LoRA(rank=2, target_modules=["embed_tokens", "q_proj"]))
    embedding = next(m for m in cohort.space.modules if "embed_tokens" in m.name)
    with pytest.raises(ConfigError, match="embed_tokens"):
        cohort.load_base({embedding.name: Piece(np.ones((24, 1)), np.ones((1, 61)))})
