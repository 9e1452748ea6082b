"""Audits of whole runs: what the canaries show of a broken mechanism, `shoal audit`, and membership inference."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

import fl.audit
from fl.audit import audit
from fl.cli import main
from fl.compose import compose
from fl.errors import ConfigError, ShoalError
from fl.experiment import Settings, Shared
from fl.keys import generator
from fl.records import read_run
from fl.run import resume
from privacy.audit.log import SPARE, log_of
from tests.helpers import ENCODER, SHARED, go, same_metrics
from tests.privacy.audit.faults import FAULTS, plant
from tests.test_resume import killed_at, moments, same_end

BATCH = 43
# One holder of 173 examples, 10 steps at rate 1/4, 400 canaries.
PRIVATE = (
    "privacy=dp_sgd", "privacy.audit=true", "privacy.epsilon=0.3", "privacy.audit_canaries=400", "clients.number=1",
    "local.steps=5", f"local.batch_size={BATCH}", "evaluation.every=0", "evaluation.clients=never",
)  # fmt: skip
SMALL = ("privacy=dp_sgd", "privacy.audit=true", "privacy.audit_canaries=64")
FALSE_ALARM = 1e-7  # at this error the bound contradicts a correct mechanism with no larger probability


@pytest.fixture
def logs(monkeypatch):
    """The logs of the runs that are made."""
    kept, canaries = [], fl.audit.canaries
    monkeypatch.setattr(fl.audit, "canaries", lambda guard: (kept.append(log_of(guard)), canaries(guard))[1])
    return kept


@pytest.mark.parametrize("seed", [0, 1])
def test_the_mechanism_is_not_contradicted(tmp_path, logs, seed):
    go(tmp_path / "run", *PRIVATE, f"seed={seed}")
    assert not logs[0].verdict(1 - FALSE_ALARM).contradicts
    found = read_run(tmp_path / "run")["audit"]
    assert found["contradicts"] is False  # at these seeds
    assert found["bound"]["ceiling"] > 2 * found["claimed"]  # it could have been
    assert (found["releases"], found["canaries"], found["unit"]) == (10, 400, "example")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_contradicted(tmp_path, monkeypatch, capsys, fault):
    plant(monkeypatch, fault, BATCH)
    go(tmp_path / "run", *PRIVATE)
    run = read_run(tmp_path / "run")
    assert run["status"] == "completed"
    assert run["audit"]["contradicts"] is True
    assert run["audit"]["bound"]["epsilon"] > run["audit"]["claimed"]
    assert "The claim fails" in " ".join(capsys.readouterr().out.split())  # a quiet run says so too


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("privacy.clipping=per_layer",), ("privacy.clipping=per_adapter",), ("privacy.adaptive=true",),
        ("adapter=ffa",), ("adapter=rolora",), ("adapter=lora_xs", "adapter.rank=12"), ("local=dylora",),
        ("adapter.rank=[2,4]", "aggregator=flora"),
    ],
    ids=lambda more: more[0],
)  # fmt: skip
@pytest.mark.parametrize("fault", ["", "noise dropped"])
def test_every_kind_of_clipping_and_adapter_can_be_audited(tmp_path, monkeypatch, logs, more, fault):
    plant(monkeypatch, fault)
    go(tmp_path / "run", *PRIVATE, "privacy.count_noise=40", *more)
    assert logs[0].verdict(0.95 if fault else 1 - FALSE_ALARM).contradicts == bool(fault)


def test_canaries_count_neither_as_examples_nor_in_the_claim(tmp_path):
    go(tmp_path / "plain", "privacy=dp_sgd")
    go(tmp_path / "audited", *SMALL)
    plain, audited = read_run(tmp_path / "plain"), read_run(tmp_path / "audited")
    assert audited["privacy_statement"] == plain["privacy_statement"]
    assert "audit" not in plain and not (tmp_path / "plain" / "audit.json").exists()
    assert json.loads((tmp_path / "audited" / "audit.json").read_text()) == {"canaries": audited["audit"]}
    assert not same_metrics(tmp_path / "plain", tmp_path / "audited")  # but they move the model


def test_the_audited_client_is_one_of_the_largest_epsilon_or_the_one_that_is_named(tmp_path, logs):
    uneven = ("partition=dirichlet", "partition.alpha=0.3", "privacy.epsilon=null", "privacy.noise_multiplier=1")
    go(tmp_path / "largest", *SMALL, *uneven)
    run = read_run(tmp_path / "largest")
    rows = run["privacy_statement"]["holders"]
    assert len({row["epsilon"] for row in rows}) > 1
    assert logs[0].client == max(rows, key=lambda row: row["epsilon"])["client"]
    go(tmp_path / "named", *SMALL, "privacy.audit_client=2")
    assert logs[1].client == 2
    with pytest.raises(ConfigError, match=r"privacy.audit_client.*0 to 3"):
        go(tmp_path / "none", *SMALL, "privacy.audit_client=4")


def test_canaries_are_as_many_as_fit(tmp_path, logs):
    few = ("adapter=lora_xs", "adapter.rank=3")
    go(tmp_path / "run", *SMALL[:2], *few)
    trained = read_run(tmp_path / "run")["trainable_parameters"]
    assert logs[0].canaries == trained - SPARE < 1000


def test_a_run_that_is_cut_off_ends_with_the_same_verdict(tmp_path):
    more = (*SMALL, "clients.number=2")
    total = moments(tmp_path / "whole", *more)
    for k in (total // 3, 2 * total // 3):
        killed_at(k, tmp_path / str(k), *more)
        resume(tmp_path / str(k), shared=SHARED, quiet=True)
        same_end(tmp_path / str(k), tmp_path / "whole")
    assert read_run(tmp_path / "whole")["audit"]["releases"] == 4


def test_how_many_clients_train_together_does_not_change_the_verdict(tmp_path, logs):
    for size in (1, 4):
        go(tmp_path / str(size), *SMALL, f"engine.cohort_size={size}")
    assert np.allclose(logs[0].scores, logs[1].scores, rtol=1e-3, atol=1e-3)


# Membership inference


def shuffled_labels() -> Shared:
    """The tiny sentences with random ones of 20 labels: what a model knows of them it has learnt by heart."""
    settings, shared = Settings.of(compose([*ENCODER, *OVERFIT])[0]), Shared()
    train, test = shared.data(settings)
    labels = [generator("labels", i).integers(0, 20, len(part)) for i, part in enumerate((train, test))]
    key = next(iter(shared.tokens))
    names = [f"label {i}" for i in range(20)]
    shared.tokens[key] = tuple(
        replace(part, labels=drawn, label_names=names) for part, drawn in zip((train, test), labels, strict=True)
    )
    return shared


OVERFIT = (
    "clients.number=1", "data.client_test_fraction=0.3", "schedule.rounds=3", "local.steps=60", "local.lr=0.01",
    "local.batch_size=32", "evaluation.every=0", "model.head_std=0.02",
)  # fmt: skip


def test_an_overfit_model_is_found_out_and_a_private_one_is_not(tmp_path):
    shared = shuffled_labels()
    go(tmp_path / "plain", *OVERFIT, shared=shared)
    go(tmp_path / "private", *OVERFIT, "privacy=dp_sgd", "privacy.epsilon=1", "local.steps=10", shared=shared)
    plain, private = (audit(tmp_path / name, shared) for name in ("plain", "private"))
    for found in plain["membership"]:
        assert found["auc"]["low"] > 0.85 and found["auc"]["value"] > 0.9
        assert found["found"]["0.001"]["note"].startswith("too few")
    for found in private["membership"]:
        # No attack on one example does better at epsilon 1, but for delta: the ROC is below two lines through (1/(1+e),
        # e/(1+e)), whose area is e/(1+e).
        assert found["auc"]["value"] < math.e / (1 + math.e)
    assert plain["worst_client"]["auc"]["value"] > 0.9
    assert plain["claimed"]["epsilon"] is None
    assert private["claimed"]["epsilon"] == pytest.approx(1, rel=0.02)


def test_the_command_writes_a_file_and_a_section_of_the_report(tmp_path, capsys):
    folder = tmp_path / "run"
    go(folder, *SMALL, "data.client_test_fraction=0.3")
    assert main(["audit", str(folder)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    found = json.loads((folder / "audit.json").read_text())
    assert found["canaries"] == read_run(folder)["audit"]
    assert "The ledger claims epsilon" in out and "at client" in out and "too few others" in out
    page = (folder / "report.html").read_text()
    assert "<h2>Audit</h2>" in page and "calibrated loss" in page and found["canaries"]["sentence"][:40] in page
    members = sum(read_run(folder)["partition"]["sizes"])
    held_out = sum(read_run(folder)["partition"]["test_sizes"])
    assert [(m["members"], m["others"]) for m in found["membership"]] == 2 * [(members, held_out + 48)]


def test_a_run_without_privacy_and_one_of_a_language_model_can_be_audited(tmp_path):
    from tests.helpers import DECODER

    go(tmp_path / "run", base=DECODER)
    found = audit(tmp_path / "run", SHARED)
    assert found["canaries"] is None and len(found["membership"]) == 2
    assert found["worst_client"]["members"] > 8


def test_what_can_not_be_audited(tmp_path, capsys):
    assert main(["audit", str(tmp_path / "nowhere")]) == 1
    assert "holds no run to audit" in capsys.readouterr().err
    folder = tmp_path / "run"
    go(folder)
    record = read_run(folder)
    (folder / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    with pytest.raises(ShoalError, match=r"not complete \(interrupted\).*--resume"):
        audit(folder, SHARED)
    (folder / "run.json").write_text(json.dumps(record))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text("{")
    with pytest.raises(ShoalError, match="config.yaml can't be read"):
        audit(folder, SHARED)
    (folder / "config.yaml").write_text(config.replace("rank: 8", "rank: 3"))
    with pytest.raises(ShoalError, match="another model or adapter"):
        audit(folder, SHARED)
    (folder / "config.yaml").write_text(config)
    (folder / "checkpoint" / "checkpoint.safetensors").unlink()
    with pytest.raises(ShoalError, match="no checkpoint"):
        audit(folder, SHARED)


def test_a_client_is_compared_with_others_of_its_own_labels():
    """A client whose labels are easier is not exposed by that."""
    labels = np.repeat([0, 1], 400)
    rng = generator("scores")
    scores = labels + 0.1 * rng.standard_normal(800)  # the label decides the score; membership does not
    order = rng.permutation(800)
    members, others = order[:400], order[400:]
    mine = np.concatenate([members[labels[members] == 1][:50], members[labels[members] == 0][:5]])
    both = np.concatenate([mine, others])
    worst = fl.audit._worst(scores[both], np.zeros(len(mine), dtype=int), labels[both], 1e-3)
    assert worst[0] == 0
    assert worst[1].auc.low < 0.5 < worst[1].auc.high
    assert worst[1].members == worst[1].others == 55
