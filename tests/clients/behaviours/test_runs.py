"""Attacks in whole runs: what reaches the server's model."""

import numpy as np
import pytest

from tests.helpers import go, metrics, vector

SIX = ("clients.number=6", "adapter=lora", "local.lr=0.01")
TURNED = ("attack=gauge", "attack.clients=[1,4]", "attack.kind=rotation")


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    """The adapter after two rounds of the tiny experiment with further settings, and its rounds."""

    def run(*more: str) -> tuple[np.ndarray, list[dict]]:
        folder = tmp_path_factory.mktemp("run")
        go(folder / "run", *SIX, *more)
        return vector(folder / "run"), [e for e in metrics(folder / "run") if e["event"] == "round"]

    return run


def test_another_basis_ruins_a_mean_of_factors_and_not_a_mean_of_products(final):
    """FlexLoRA averages the products: to it a client in another basis is an honest one."""
    apart = {}
    for rule in ("fedavg", "flexlora"):
        honest, _ = final(f"aggregator={rule}")
        turned, rounds = final(f"aggregator={rule}", *TURNED)
        assert all(r["accepted"] == 6 for r in rounds)
        apart[rule] = distance(turned, honest)
    assert apart["flexlora"] < 1e-3
    assert apart["fedavg"] > 0.1


def test_before_its_round_an_attack_changes_nothing(final):
    honest, _ = final()
    for attack in ("ipm", "label_flip", "gauge"):
        late, _ = final(f"attack={attack}", "attack.clients=[1,4]", "attack.from_round=3")
        np.testing.assert_array_equal(late, honest)


def test_wrong_labels_are_learnt(final):
    honest, _ = final()
    flipped, rounds = final("attack=label_flip", "attack.clients=[1,4]", "attack.kind=shift")
    assert distance(flipped, honest) > 0.01
    assert all(r["accepted"] == 6 for r in rounds)


def test_poisoned_samples_have_hidden_states_of_their_own(tmp_path):
    """What lies below the adapters is computed once for runs of the same samples, and of no others."""
    words = ("adapter.layers=[1]", "adapter=lora")
    bad = ("attack=label_flip", "attack.clients=[1]")
    go(tmp_path / "before", *words, "model.prefix_cache=always")
    go(tmp_path / "cached", *words, *bad, "model.prefix_cache=always")
    go(tmp_path / "plain", *words, *bad, "model.prefix_cache=never")
    assert distance(vector(tmp_path / "cached"), vector(tmp_path / "plain")) < 1e-5
