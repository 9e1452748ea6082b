"""Whole runs without a server: one word away from the run with one, replayed, resumed, attacked and refused."""

from __future__ import annotations

import numpy as np
import pytest

from fl.errors import ConfigError
from fl.records import read_run
from fl.run import resume
from tests.helpers import SHARED, clients, evaluations, final, go, metrics, rounds, same_metrics, vector, weights
from tests.test_resume import killed_at, moments, same_end

SGD = ("local=sgd", "local.lr=0.1", "adapter=ffa")
SCHEDULES = {
    "dpsgd": ("schedule=dpsgd",),
    "parallel": ("schedule=dpsgd", "schedule.order=parallel", "network=lognormal", "network.dropout=0.3"),
    "gradient_tracking": ("schedule=gradient_tracking",),
    "push_sum": ("schedule=push_sum", "topology=one_peer_exponential"),
    "choco": ("schedule=choco", "schedule.compressor=qsgd"),
    "monna": ("schedule=monna", "aggregator.f=1", "attack=sign_flip", "attack.clients=[2]", "clients.number=5"),
    "rolora": ("schedule=dpsgd", "adapter=rolora"),
    "ad_psgd": ("schedule=ad_psgd", "network=lognormal"),
    "a2cid2": ("schedule=a2cid2", "network=lognormal"),
}


def test_the_complete_graph_is_the_server_by_one_word(tmp_path):
    go(tmp_path / "server", *SGD, "aggregator.weights=uniform")
    go(tmp_path / "peers", *SGD, "schedule=dpsgd", "topology=complete")
    assert np.allclose(vector(tmp_path / "server"), vector(tmp_path / "peers"), atol=1e-6)
    assert final(tmp_path / "server")["accuracy"] == final(tmp_path / "peers")["accuracy"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_that_is_killed_goes_on_to_the_same_end(tmp_path, name):
    words = ("schedule.rounds=3", "local.steps=1", *SGD, *SCHEDULES[name])
    total = moments(tmp_path / "whole", *words)
    for k in (total // 2, total - 8):
        killed_at(k, tmp_path / str(k), *words)
        resume(tmp_path / str(k), shared=SHARED, quiet=True)
        same_end(tmp_path / str(k), tmp_path / "whole")


def test_what_a_run_records_of_its_peers(tmp_path):
    go(tmp_path, "schedule=dpsgd", "topology=ring", "clients.number=5", "schedule.rounds=3", "evaluation.peers=always")
    events = rounds(tmp_path)
    assert all(e["consensus"] > 0 and e["bytes_links"] == e["bytes_up"] == e["bytes_down"] for e in events)
    [links] = [e["links"] for e in metrics(tmp_path) if e["event"] == "links"]
    assert sorted((a, b) for a, b, _ in links) == sorted((i, j) for i in range(5) for j in ((i + 1) % 5, (i - 1) % 5))
    assert sum(size for *_, size in links) == sum(e["bytes_up"] for e in events) == final(tmp_path)["bytes_up"]
    seen = evaluations(tmp_path, "peers")
    assert [e["round"] for e in seen] == [0, 1, 2, 3] and all(len(e["per_client"]) == 5 for e in seen)
    assert len(set(seen[0]["per_client"])) == 1  # all begin alike
    about = read_run(tmp_path)["topology"]
    assert about["name"] == "ring" and about["edges"] == 5 and 0 < about["gap"] < 1


def test_frozen_factors_neither_travel_nor_change(tmp_path):
    go(tmp_path / "ffa", "schedule=dpsgd", "adapter=ffa", "topology=ring")
    go(tmp_path / "lora", "schedule=dpsgd", "adapter=lora", "topology=ring")
    assert final(tmp_path / "ffa")["bytes_up"] < 0.8 * final(tmp_path / "lora")["bytes_up"]


def test_a_robust_rule_among_peers_withstands_what_ruins_the_mean(tmp_path):
    attack = ("attack=ipm", "attack.scale=8", "attack.clients=[1,4]", "clients.number=10", "schedule.rounds=4")
    words = ("schedule=dpsgd", "topology=complete", "local.lr=0.01", *attack, "aggregator.f=2")
    apart = {}
    for rule in ("mean", "median"):
        go(tmp_path / rule, *words, f"aggregator.combine={rule}")
        apart[rule] = max(e["update_norm"] for e in rounds(tmp_path / rule))
    assert np.isfinite(vector(tmp_path / "median")).all()
    assert apart["mean"] > 2 * apart["median"]


def test_a_backdoor_is_learnt_and_its_success_recorded(tmp_path):
    words = ("attack=backdoor", "attack.clients=[0,1]", "schedule.rounds=3")
    go(tmp_path, *words)
    assert all(0 <= e["attack_success"] <= 1 for e in evaluations(tmp_path))
    assert "attack_success" in final(tmp_path)


def test_the_servers_own_update_is_trained_on_public_samples(tmp_path):
    go(tmp_path / "a", "aggregator.combine=fltrust", "data.public=12")
    go(tmp_path / "b", "aggregator.combine=fltrust", "data.public=12")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") and same_metrics(tmp_path / "a", tmp_path / "b")


def test_a_backdoor_among_peers_is_trained_on_what_it_poisoned(tmp_path):
    words = ("schedule=dpsgd", "topology=complete", "schedule.rounds=1", *SGD)
    go(tmp_path / "clean", *words)
    go(tmp_path / "same", *words, "attack=backdoor", "attack.clients=[0]", "attack.boost=1", "attack.from_round=2")
    go(tmp_path / "bad", *words, "attack=backdoor", "attack.clients=[0]", "attack.boost=1")
    losses = [[e["loss"] for e in clients(tmp_path / name)] for name in ("clean", "same", "bad")]
    assert losses[0] == losses[1] and losses[0][1:] == losses[2][1:] and losses[0][0] != losses[2][0]


@pytest.mark.parametrize("start", ["olora", "pissa"])
def test_a_start_that_changes_the_base_reaches_every_peer(tmp_path, start):
    norms = []
    for name, words in (
        ("server", ("aggregator.weights=uniform",)),
        ("peers", ("schedule=dpsgd", "topology=complete")),
    ):
        go(tmp_path / name, f"adapter.init={start}", "local=sgd", "local.lr=0.01", "adapter=lora", *words)
        norms.append(rounds(tmp_path / name)[0]["update_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


REFUSED = {
    "schedule=dpsgd sampling=poisson": "sampling",
    "schedule=dpsgd aggregator.weights=[1,2,3,4]": "aggregator.weights",
    "schedule=dpsgd network=lognormal network.on_leave=lose": "network.on_leave",
    "schedule=dpsgd attack=sign_flip attack.fraction=1": "attack",
    "schedule=dpsgd schedule.order=parallel attack=backdoor": "schedule.order",
    "schedule=monna adapter=rolora": "adapter",
    "schedule=monna aggregator.f=3 aggregator.combine=mean": "aggregator.f",
    "schedule=fedbuff schedule.buffer=2 schedule.weights=identical aggregator.staleness=constant "
    "aggregator.combine=krum aggregator.f=0": "aggregator.f",
    "aggregator=flexlora aggregator.combine=fltrust data.public=8": "aggregator.combine",
    "aggregator.combine=fltrust data.public=8 attack=ipm attack.optimise=true": "attack.optimise",
    "topology=ring": r"topology='ring'.*schedule=dpsgd",
    "schedule=dpsgd aggregator=flora": r"aggregator='FLoRA'",
    "schedule=gradient_tracking aggregator.combine=krum aggregator.f=1": "aggregator.combine",
    "schedule=dpsgd topology=ring aggregator.combine=krum aggregator.f=1": "2 neighbours",
    "schedule=dpsgd aggregator.combine=fltrust data.public=8": "schedule",
    "schedule=dpsgd aggregator.combine=foolsgold": "aggregator.combine",
    "schedule=choco attack=alie attack.fraction=0.5": "attack",
    "schedule=dpsgd server_optimizer=fedadam": "server_optimizer",
    "schedule=dpsgd clients.per_round=2": "clients.per_round",
    "schedule=dpsgd adapter.rank=[2,4]": "adapter.rank",
    "schedule=dpsgd privacy=central": "schedule",
    "schedule=dpsgd secure_aggregation=secagg": "secure_aggregation",
    "schedule=dpsgd topology=hypercube clients.number=6": "clients.number",
    "attack=equivocation": "attack",
    "aggregator.combine=krum aggregator.f=1": "aggregator.f",
    "aggregator.combine=fltrust": "public",
    "schedule=fedasync attack=alie": "attack",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_can_not_be_is_refused_before_anything_is_trained(tmp_path, words):
    with pytest.raises(ConfigError, match=REFUSED[words]):
        go(tmp_path, *words.split())
    assert rounds(tmp_path) == [] if (tmp_path / "metrics.jsonl").is_file() else True
