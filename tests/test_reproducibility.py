"""The same settings and seed give the same bits; what only changes how work is laid out changes rounding at most."""

import random

import numpy as np
import pytest
import torch

from fl.records import read_run, without_wall
from tests.helpers import DECODER, ENCODER, evaluations, go, metrics, same_metrics, vector, weights

# Whatever draws: sampling, over-selection, dropouts, availability, Dirichlet parts, faulty clients, adapter dropout.
DRAWING = (
    "partition=dirichlet",
    "partition.alpha=0.3",
    "clients.number=6",
    "clients.per_round=3",
    "sampling.over_selection=0.5",
    "network=lognormal",
    "network.dropout=0.2",
    "network.availability=0.8",
    "attack=faulty",
    "attack.fraction=0.2",
    "adapter.dropout=0.1",
    "schedule.rounds=4",
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One run of the tiny experiment, to compare others with."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    go(folder)
    return folder


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("base", [ENCODER, DECODER], ids=["encoder", "decoder"])
@pytest.mark.parametrize("more", [(), DRAWING], ids=["plain", "drawing"])
def test_the_same_settings_and_seed_give_the_same_bytes(tmp_path, base, more):
    if base is DECODER and "partition=dirichlet" in more:
        more = tuple(w for w in more if not w.startswith("partition"))
    go(tmp_path / "a", *more, base=base)
    go(tmp_path / "b", *more, base=base, shared=None)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert same_metrics(tmp_path / "a", tmp_path / "b")
    first, second = (without_wall(read_run(tmp_path / name)) for name in "ab")
    assert first == second
    for name in ("README.md", "adapter_config.json", "probe.safetensors"):
        assert (tmp_path / "a" / "adapter" / name).read_bytes() == (tmp_path / "b" / "adapter" / name).read_bytes()


def test_another_seed_gives_another_run(tmp_path, plain):
    go(tmp_path / "run", "seed=1")
    assert weights(tmp_path / "run") != weights(plain)
    assert metrics(tmp_path / "run") != metrics(plain)
    # The base is the same in every run; what the seed moves is the adapter's start, the parts and the batches.
    assert relative(vector(tmp_path / "run"), vector(plain)) > 0.1


@pytest.mark.parametrize("base", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_the_cohort_size_changes_nothing_but_rounding(tmp_path, base):
    ragged = ("partition=quantity", "partition.alpha=1", "local.steps=null", "local.epochs=1", "clients.number=8")
    for size in (1, 8):
        go(tmp_path / str(size), *ragged, f"engine.cohort_size={size}", base=base)
    one, eight = vector(tmp_path / "1"), vector(tmp_path / "8")
    assert relative(eight, one) < 1e-4
    for a, b in zip(metrics(tmp_path / "1"), metrics(tmp_path / "8"), strict=True):
        assert {k: v for k, v in a.items() if not isinstance(v, float | list)} == {
            k: v for k, v in b.items() if not isinstance(v, float | list)
        }
        assert a["loss" if "loss" in a else "loss_mean"] == pytest.approx(
            b["loss" if "loss" in b else "loss_mean"], rel=1e-4
        )


def test_worker_processes_change_no_bit(tmp_path, plain):
    go(tmp_path / "run", "engine.workers=2", "engine.cohort_size=2")
    go(tmp_path / "one", "engine.workers=1", "engine.cohort_size=2")
    assert weights(tmp_path / "run") == weights(tmp_path / "one")
    assert same_metrics(tmp_path / "run", tmp_path / "one")
    assert relative(vector(tmp_path / "run"), vector(plain)) < 1e-4


@pytest.mark.parametrize("copy", ["wire", "none"])
def test_how_messages_are_handed_over_changes_no_bit(tmp_path, plain, copy):
    go(tmp_path / "run", f"engine.message_copy={copy}")
    assert weights(tmp_path / "run") == weights(plain)
    assert same_metrics(tmp_path / "run", plain)


@pytest.mark.parametrize(
    "evaluation",
    [
        ["evaluation.every=0", "evaluation.clients=never"],
        ["evaluation.clients=always"],
        ["evaluation.clients=always", "evaluation.batch_size=3", "engine.workers=2"],
    ],
    ids=" ".join,
)
def test_evaluating_moves_nothing(tmp_path, plain, evaluation):
    go(tmp_path / "run", *evaluation, "checkpoint_every=2")
    assert weights(tmp_path / "run") == weights(plain)

    def training(folder):
        return [event for event in metrics(folder) if event["event"] != "eval"]

    assert training(tmp_path / "run") == training(plain)
    rounds = {1, 2} if "evaluation.clients=always" in evaluation else set()
    assert {e["round"] for e in evaluations(tmp_path / "run", "clients")} - {0} == rounds


def test_a_client_does_not_depend_on_who_else_trains(tmp_path):
    """Draws are keyed by client and round, so the first round's losses are the same whoever is asked beside it."""
    go(tmp_path / "all", "schedule.rounds=1")
    go(tmp_path / "some", "schedule.rounds=1", "clients.per_round=2")
    everyone = {e["client"]: e["loss"] for e in metrics(tmp_path / "all") if e["event"] == "client"}
    some = {e["client"]: e["loss"] for e in metrics(tmp_path / "some") if e["event"] == "client"}
    assert len(everyone) == 4
    assert len(some) == 2
    for client, loss in some.items():
        assert loss == pytest.approx(everyone[client], rel=1e-6)


def test_global_generators_are_neither_read_nor_moved(tmp_path, plain):
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        before = states()
        go(tmp_path / str(seed), shared=None)
        assert states() == before
        assert weights(tmp_path / str(seed)) == weights(plain)


@pytest.mark.slow
def test_two_processes_give_the_same_bytes_at_measured_settings(tmp_path):
    """As a user runs it: the plan is measured once, cached, and used again by the next process."""
    import os
    import subprocess
    import sys

    words = ["model=tiny-encoder", "data=tiny", "clients.number=4", "schedule.rounds=2", "report=false"]
    environment = os.environ | {"SHOAL_CACHE": str(tmp_path / "cache")}
    for name in ("a", "b"):
        command = [sys.executable, "-m", "fl.cli", "run", *words, f"hydra.run.dir={tmp_path / name}", "--quiet"]
        subprocess.run(command, check=True, env=environment, timeout=300)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert same_metrics(tmp_path / "a", tmp_path / "b")
