import numpy as np
import pytest
import torch

from fl.keys import generator, key_bytes, key_int, seeded_globals, torch_generator


def test_a_key_names_its_parts_and_nothing_else():
    paths = [
        (1, 2),
        (12,),
        ("1", 2),
        (1, "2"),
        (1, 2, ""),
        ("1i2",),
        (1,),
        (2, 1),
        ("a", "bc"),
        ("ab", "c"),
        (-1, 2),
        (),
    ]
    assert len({key_bytes(*path) for path in paths}) == len(paths)
    assert key_bytes(1, "batches", 3) == key_bytes(1, "batches", 3)


def test_a_numpy_integer_is_the_same_part_as_its_number():
    assert key_bytes(np.int64(7), "x") == key_bytes(7, "x")


def test_keys_do_not_change_between_versions():
    """Runs of one seed are to replay in every later version, so the hash is pinned."""
    assert key_bytes(1, "batches", 2).hex()[:16] == "672d3f377c75a896"
    assert key_int(1, "batches", 2) == 5_428_028_039_069_931_187
    assert generator(1, "batches", 2).integers(1_000_000, size=3).tolist() == [847714, 303527, 268158]


def test_integer_seeds_fit_63_bits():
    seeds = [key_int("seed", i) for i in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert len(set(seeds)) == 1000


def test_generators_are_fresh_and_independent_of_earlier_draws():
    first = generator(5, "x").random(4)
    generator(5, "y").random(1000)
    np.testing.assert_array_equal(generator(5, "x").random(4), first)
    assert not np.allclose(generator(5, "y").random(4), first)
    many = np.array([generator("u", i).random() for i in range(2000)])
    assert abs(many.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.07


def test_torch_generators_too():
    a = torch.rand(3, generator=torch_generator(5, "x"))
    assert torch.equal(a, torch.rand(3, generator=torch_generator(5, "x")))
    assert not torch.equal(a, torch.rand(3, generator=torch_generator(5, "y")))


@pytest.mark.parametrize("fails", [False, True])
def test_seeded_globals_are_put_back(fails):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    inside = []
    try:
        with seeded_globals(1, "adapter"):
            inside.append(torch.rand(2))
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert torch.equal(torch.rand(2), expected)
    with seeded_globals(1, "adapter"):
        assert torch.equal(torch.rand(2), inside[0])
