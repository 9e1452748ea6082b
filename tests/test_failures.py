"""Clients that break, end to end: each is counted under its reason, the others notice nothing, the run goes on."""

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from aggregators.mean import weighted_mean
from clients.behaviours.faulty import Faulty
from fl import checkpoint
from fl.cli import main
from fl.errors import RunStopped
from fl.records import read_run
from tests.helpers import ENCODER, clients, final, go, metrics, rounds, vector, weights

ROOT = Path(__file__).parents[1]
REASONS = {
    "nan": "not_finite",
    "inf": "not_finite",
    "wrong_shape": "shape",
    "oversize": "shape",
    "huge_norm": "too_large",
    "wrong_version": "version",
    "wrong_layout": "layout",
    "crash": "error",
    "silent": "error",
    "huge_weight": "weight",
    "zero_weight": "weight",
}
FAULTY = ("attack=faulty", "attack.clients=[2]", "schedule.rounds=3")


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A run in which client 2 is never heard."""
    folder = tmp_path_factory.mktemp("without") / "run"
    go(folder, *FAULTY, "attack.kind=silent")
    return folder


def test_every_kind_of_fault_is_tested_and_documented():
    kinds = next(f for f in fields(Faulty) if f.name == "kind").metadata["choices"]
    assert set(REASONS) == set(kinds)
    table = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|.*\| `(\w+)`", (ROOT / "docs/failure.md").read_text(), re.MULTILINE)
    documented = {kind: reason for names, reason in table for kind in re.findall(r"`(\w+)`", names)}
    assert {kind: documented.get(kind) for kind in REASONS} == REASONS


@pytest.mark.parametrize("kind", REASONS)
def test_a_bad_reply_is_counted_by_name_and_the_round_goes_on(tmp_path, without, kind):
    folder = tmp_path / "run"
    done = go(folder, *FAULTY, f"attack.kind={kind}")
    reason = REASONS[kind]
    assert done.run["status"] == "completed"
    assert (final(folder)["rejected"], final(folder)["rejected_updates"]) == ({reason: 3}, 3)
    for event in rounds(folder):
        assert (event["sampled"], event["accepted"], event["rejected"]) == (4, 3, {reason: 1})
    for event in clients(folder):
        bad = event["client"] == 2
        assert (event["accepted"], event["reason"]) == (not bad, reason if bad else None)
        assert bad == (event["loss"] is None)
    # Whatever the client sends instead, the others' aggregate is the one without it, bit for bit.
    assert weights(folder) == weights(without)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_aggregate_is_the_mean_of_the_honest(tmp_path, monkeypatch, weighting):
    seen = []
    aggregate = FedAvg.aggregate

    def watching(self, server, updates, optimizer=None):
        seen.append((server, updates))
        return aggregate(self, server, updates, optimizer)

    monkeypatch.setattr(FedAvg, "aggregate", watching)
    more = ("schedule.rounds=1", f"aggregator.weights={weighting}", "partition=quantity")
    go(tmp_path / "honest", *more)
    go(tmp_path / "faulty", *more, "attack=faulty", "attack.kind=inf", "attack.clients=[0,3]")
    (server, honest), (_, rest) = seen
    assert [u.client for u in rest] == [1, 2]
    kept = [u for u in honest if u.client in (1, 2)]
    counts = [float(u.examples) if weighting == "examples" else 1.0 for u in kept]
    expected = (server.vector.astype(np.float64) + weighted_mean([u.vector for u in kept], counts)).astype(np.float32)
    arrays, _ = checkpoint.load(tmp_path / "faulty" / "checkpoint")
    np.testing.assert_array_equal(arrays["server/vector"], expected)
    other, _ = checkpoint.load(tmp_path / "honest" / "checkpoint")
    assert np.abs(other["server/vector"] - expected).max() > 1e-4


def test_faults_begin_in_their_round(tmp_path):
    go(tmp_path / "run", *FAULTY, "attack.kind=nan", "attack.from_round=3")
    assert [e["rejected"] for e in rounds(tmp_path / "run")] == [{}, {}, {"not_finite": 1}]


def test_several_kinds_of_rejection_add_up(tmp_path):
    more = ("attack=faulty", "attack.clients=[1]", "attack.kind=nan", "network=uniform", "network.dropout=0.4")
    go(tmp_path / "run", *more, "schedule.rounds=6", "evaluation.every=0")
    counted = {"not_finite": 0, "error": 0}
    for event in clients(tmp_path / "run"):
        if event["reason"]:
            counted[event["reason"]] += 1
    assert min(counted.values()) > 0
    assert final(tmp_path / "run")["rejected"] == counted
    assert sum(e["accepted"] for e in rounds(tmp_path / "run")) == 6 * 4 - sum(counted.values())


def test_with_too_few_left_the_run_stops_with_a_checkpoint(tmp_path, capfd):
    folder = tmp_path / "run"
    words = [*ENCODER, "attack=faulty", "attack.fraction=1", "attack.kind=crash", "attack.from_round=2"]
    assert main(["run", *words, f"hydra.run.dir={folder}", "--quiet"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("shoal: Round 2 has 0 accepted updates of 4 clients asked;")
    assert "shoal run --resume" in err
    run = read_run(folder)
    assert run["status"] == "failed"
    assert (run["final"]["rounds"], run["final"]["client_steps"]) == (1, 8)
    arrays, meta = checkpoint.load(folder / "checkpoint")
    assert (meta["server"]["round"], meta["server"]["version"]) == (1, 1)
    assert not (folder / "adapter").exists()
    assert [e["reason"] for e in clients(folder, 2)] == ["error"] * 4  # what happened is still written down
    go(tmp_path / "one", "schedule.rounds=1")
    np.testing.assert_array_equal(
        arrays["server/vector"], checkpoint.load(tmp_path / "one" / "checkpoint")[0]["server/vector"]
    )


def test_min_clients_is_the_number_that_a_round_needs(tmp_path):
    go(tmp_path / "three", *FAULTY, "schedule.min_clients=3")
    with pytest.raises(RunStopped, match=r"3 accepted updates of 4 clients asked; schedule\.min_clients is 4"):
        go(tmp_path / "four", *FAULTY, "schedule.min_clients=4")


def test_an_honest_update_beyond_the_bound_is_too_large(tmp_path):
    with pytest.raises(RunStopped, match="'too_large': 4"):
        go(tmp_path / "run", "schedule.max_update_norm=1e-6")


def test_training_that_diverges_is_refused_not_averaged(tmp_path):
    """A learning rate that makes every client's numbers infinite must not end in an adapter of NaN."""
    with pytest.raises(RunStopped, match="not_finite|too_large"):
        go(tmp_path / "run", "local=sgd", "local.steps=8", "local.lr=1e30")


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path, monkeypatch, capfd):
    folder, save, calls = tmp_path / "run", checkpoint.save_file, []

    def filling(*arguments, **named):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return save(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save_file", filling)
    assert main(["run", *ENCODER, "schedule.rounds=4", f"hydra.run.dir={folder}", "--quiet"]) == 1
    assert "No space left on device" in capfd.readouterr().err.splitlines()[-1]
    assert read_run(folder)["status"] == "failed"
    assert checkpoint.load(folder / "checkpoint")[1]["server"]["round"] == 1


def test_an_unforeseen_error_is_recorded(tmp_path, monkeypatch):
    def broken(*_arguments):
        raise ZeroDivisionError("in a rule")

    monkeypatch.setattr(FedAvg, "aggregate", broken)
    with pytest.raises(ZeroDivisionError):
        go(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert (run["status"], run["error"]) == ("failed", "in a rule")
    assert metrics(tmp_path / "run")


def test_poisson_rounds_without_anyone_change_nothing(tmp_path):
    more = ("sampling=poisson", "clients.per_round=1", "schedule.rounds=8", "network=uniform", "schedule.deadline_s=60")
    go(tmp_path / "run", *more, "evaluation.every=0")
    events = rounds(tmp_path / "run")
    empty = [e for e in events if e["sampled"] == 0]
    assert 0 < len(empty) < 8
    version, clock = 0, 0.0
    for event in events:
        if event["sampled"] == 0:
            assert (event["accepted"], event["loss"], event["update_norm"]) == (0, None, 0.0)
            assert (event["version"], event["virtual_s"]) == (version, clock)
            assert (event["bytes_up"], event["bytes_down"], event["client_steps"]) == (0, 0, 0)
        version, clock = event["version"], event["virtual_s"]
    assert version == 8 - len(empty)
    assert np.isfinite(vector(tmp_path / "run")).all()
