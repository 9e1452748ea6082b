"""Runs of Just One Byte: one state at all peers, whoever comes and goes, in bytes that can be counted."""

import numpy as np
import pytest

from fl.compose import compose
from fl.errors import ConfigError, RunStopped
from fl.experiment import Settings
from fl.one_byte.losses import OfHead
from fl.one_byte.replicas import Replicas
from fl.records import read_run
from fl.run import resume
from fl.schedules.just_one_byte import JustOneByte
from tests.helpers import SHARED, clients, evaluations, go, metrics, rounds, vector, weights
from tests.test_resume import killed_at, moments, same_end

ONE_BYTE = ("schedule=just_one_byte", "local=sgd", "local.lr=0.1", "adapter=head", "schedule.hash_every=2")
MOVES = ("schedule.joins=[[3,2,replay],[4,3,snapshot],[6,1,replay]]", "schedule.leaves=[[3,1]]")
NUMBER = 4


def told(folder, event: str) -> list[dict]:
    return [e for e in metrics(folder) if e["event"] == event]


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Seven rounds in which two peers join and one leaves and comes back."""
    folder = tmp_path_factory.mktemp("moved") / "run"
    go(folder, *ONE_BYTE, *MOVES, "schedule.rounds=7")
    return folder


def test_all_replicas_are_one_after_joins_and_leaves(moved):
    compared = told(moved, "replicas")
    # Before a snapshot is given its donor's replica is compared.
    assert [(e["round"], e["compared"]) for e in compared] == [(2, 2), (3, 1), (4, 3), (6, 4), (7, 4)]
    assert all(e["differing"] == [] for e in compared)
    assert len({e["hash"] for e in compared}) == 5
    assert [r["consensus"] for r in rounds(moved)] == [0.0] * 7
    assert [r["sampled"] for r in rounds(moved)] == [2, 2, 2, 3, 3, 4, 4]


def test_whoever_joins_gets_what_it_asked_for(moved):
    found = [(e["round"], e["client"], e["donor"], e["how"], e["rounds"]) for e in told(moved, "catch_up")]
    assert found == [(3, 2, 0, "replay", 2), (4, 3, 0, "snapshot", 3), (6, 1, 0, "replay", 3)]
    sizes = {e["how"]: e["bytes"] for e in told(moved, "catch_up")}
    state = 4 * len(vector(moved))
    assert state < sizes["snapshot"] < state + 400
    # Two rounds of two peers with two scalars each: a bitmap, and two bytes of numbers beside four of scalars.
    assert sizes["replay"] < 260


def test_every_link_is_counted(moved):
    found, links = rounds(moved), told(moved, "links")[-1]["links"]
    assert sum(n for _, _, n in links) == sum(r["bytes_links"] for r in found)
    for r in found:
        sent = clients(moved, r["round"])
        assert sum(c["bytes_up"] for c in sent) == sum(c["bytes_down"] for c in sent) == r["bytes_links"]
        k = r["accepted"]
        assert r["bytes_scalars"] == k * (k - 1) * 2  # K (K - 1) S
    assert sum(r["bytes_catch_up"] for r in found) == sum(e["bytes"] for e in told(moved, "catch_up"))
    assert all(a != b for a, b, _ in links)


def test_a_scalar_takes_one_byte_or_four(tmp_path):
    sizes = {}
    for quantiser in ("int8log", "none"):
        for steps in (2, 10):
            folder = tmp_path / f"{quantiser}{steps}"
            words = (f"schedule.quantiser={quantiser}", f"local.steps={steps}", "schedule.rounds=1")
            go(folder, *ONE_BYTE, *words)
            (r,) = rounds(folder)
            sizes[quantiser, steps] = r["bytes_links"] / 12
            assert r["bytes_scalars"] == 12 * steps * {"int8log": 1, "none": 4}[quantiser]
    assert sizes["int8log", 10] - sizes["int8log", 2] == 8
    assert sizes["none", 10] - sizes["none", 2] == 32


def test_joining_leaving_and_replaying_change_nothing_for_the_others(tmp_path, moved):
    """How somebody joins is no matter to anybody's bits."""
    other = tuple(w.replace("snapshot", "replay") for w in MOVES)
    go(tmp_path / "run", *ONE_BYTE, *other, "schedule.rounds=7")
    assert weights(tmp_path / "run") == weights(moved)
    assert [e["how"] for e in told(tmp_path / "run", "catch_up")] == ["replay"] * 3


@pytest.mark.parametrize("catch_up", ["replay", "snapshot"])
def test_peers_that_are_lost_or_away_catch_up(tmp_path, catch_up):
    words = ("network=uniform", "network.dropout=0.3", "network.availability=0.7", "network.availability_period_s=4")
    go(
        tmp_path / "run",
        *ONE_BYTE,
        *words,
        f"schedule.catch_up={catch_up}",
        "schedule.rounds=12",
        "evaluation.every=12",
    )
    found, back = rounds(tmp_path / "run"), told(tmp_path / "run", "catch_up")
    assert any(r["rejected"].get("error") for r in found) and any(r["sampled"] < NUMBER for r in found)
    assert len(back) > 3 and {e["how"] for e in back} <= {catch_up, "replay"} and catch_up in {e["how"] for e in back}
    assert all(e["differing"] == [] for e in told(tmp_path / "run", "replicas"))
    for r in found:  # of a lost peer nothing is heard, but for what it gave others to catch up with
        lost = [c for c in clients(tmp_path / "run", r["round"]) if not c["accepted"]]
        gave = {e["donor"] for e in back if e["round"] == r["round"]}
        assert all(c["bytes_up"] == 0 for c in lost if c["client"] not in gave)
        assert len(lost) == r["sampled"] - r["accepted"]


def test_losing_everybody_leaves_the_state_as_it_is(tmp_path):
    go(tmp_path / "run", *ONE_BYTE, "network.dropout=1", "schedule.rounds=2")
    assert [(r["accepted"], r["update_norm"], r["bytes_links"]) for r in rounds(tmp_path / "run")] == [(0, 0.0, 0)] * 2
    assert told(tmp_path / "run", "catch_up") == []


def corrupting(monkeypatch, peer: int, version: int) -> None:
    """One number of a peer's replica changes by one bit, once, as of a fault of its memory."""
    whole, done = Replicas.answer, []

    def answer(self, requests):
        own = self.replicas.get(peer)
        if own is not None and own.version == version and not done:
            done.append(True)
            own.state[3] = np.nextafter(own.state[3], np.float32(np.inf))
        return whole(self, requests)

    monkeypatch.setattr(Replicas, "answer", answer)


def test_a_replica_that_differs_is_named(tmp_path, monkeypatch):
    corrupting(monkeypatch, 2, 2)
    with pytest.raises(RunStopped, match=r"After round 4 .* peer 2 [0-9a-f]{16}\. .*differing=rejoin"):
        go(tmp_path / "run", *ONE_BYTE, "schedule.rounds=6")
    assert [r["round"] for r in rounds(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_replica_that_differs_may_begin_again_from_a_snapshot(tmp_path, monkeypatch):
    corrupting(monkeypatch, 2, 2)
    go(tmp_path / "run", *ONE_BYTE, "schedule.rounds=8", "schedule.differing=rejoin")
    compared = {e["round"]: e["differing"] for e in told(tmp_path / "run", "replicas")}
    assert compared == {2: [], 4: [2], 5: [], 6: [], 8: []}
    (again,) = told(tmp_path / "run", "catch_up")
    assert (again["round"], again["client"], again["how"]) == (6, 2, "snapshot")
    assert [r["accepted"] for r in rounds(tmp_path / "run")] == [4, 4, 4, 4, 3, 4, 4, 4]


def test_a_donor_whose_replica_differs_gives_no_snapshot(tmp_path, monkeypatch):
    corrupting(monkeypatch, 0, 2)
    words = ("schedule.joins=[[4,3,snapshot]]", "schedule.hash_every=100", "schedule.rounds=6")
    go(tmp_path / "run", *ONE_BYTE, *words, "schedule.differing=rejoin")
    found = [(e["round"], e["client"], e["donor"], e["how"]) for e in told(tmp_path / "run", "catch_up")]
    assert found == [(4, 0, 1, "snapshot"), (4, 3, 1, "snapshot")]
    assert [(e["round"], e["differing"]) for e in told(tmp_path / "run", "replicas")] == [(3, [0]), (3, []), (6, [])]


def test_a_peer_whose_scalar_is_no_number_is_left_out(tmp_path, monkeypatch):
    whole = OfHead.__call__

    def broken(self, states, examples):
        results = whole(self, states, examples)
        results[0][0] = np.nan
        return results

    monkeypatch.setattr(OfHead, "__call__", broken)
    go(tmp_path / "run", *ONE_BYTE, "schedule.rounds=2", "evaluation.clients=never")
    assert rounds(tmp_path / "run")[0]["rejected"] == {"error": 1}
    assert np.isfinite(vector(tmp_path / "run")).all()


def test_the_time_of_a_round_is_that_of_its_work_and_its_links(tmp_path):
    words = ("network=uniform", "network.seconds_per_step=0.5", "network.latency_s=0.25", "network.up_mbps=null",
             "network.down_mbps=null", "network.slow_clients=[1]", "network.slow_factor=4")  # fmt: skip
    go(tmp_path / "run", *ONE_BYTE, *words, "schedule.rounds=2")
    # Two directions of the slow one take 4 s; a message goes out and in: 0.5 s.
    assert [r["virtual_s"] for r in rounds(tmp_path / "run")] == [4.5, 9.0]
    # A snapshot of 4 d bytes over links of 0.1 Mbit/s comes before the work of who gets it.
    words = (*words[:2], "network.latency_s=0", "network.up_mbps=0.1", "network.down_mbps=null")
    go(
        tmp_path / "join",
        *ONE_BYTE,
        "network=uniform",
        *words[1:],
        "schedule.joins=[[2,3,snapshot]]",
        "schedule.rounds=2",
    )
    (event,) = told(tmp_path / "join", "catch_up")
    first, second = rounds(tmp_path / "join")
    began = next(c["began_s"] for c in clients(tmp_path / "join", 2) if c["client"] == 3)
    assert began - first["virtual_s"] == pytest.approx(8 * event["bytes"] / 1e5, abs=1e-5)
    assert second["virtual_s"] > began + 1


def test_it_learns(tmp_path):
    words = ("local.steps=32", "schedule.rounds=40", "evaluation.every=40", "schedule.eps=1e-3", "local.lr=0.2")
    go(tmp_path / "run", *ONE_BYTE, *words)
    first, last = evaluations(tmp_path / "run")[0], evaluations(tmp_path / "run")[-1]
    assert last["loss"] < first["loss"] - 0.015


def test_one_byte_and_four_bytes_go_the_same_way(tmp_path):
    """The rounding's relative error is 6 % at most, and of either sign: the states stay near each other."""
    for quantiser in ("int8log", "none"):
        words = (f"schedule.quantiser={quantiser}", "schedule.rounds=5", "local.steps=4", "evaluation.every=5")
        go(tmp_path / quantiser, *ONE_BYTE, *words)
    one, four = vector(tmp_path / "int8log"), vector(tmp_path / "none")
    assert 0 < np.linalg.norm(one - four) < 0.1 * np.linalg.norm(four)


def test_the_start_may_be_made_from_the_base(tmp_path):
    go(
        tmp_path / "run",
        *ONE_BYTE[:3],
        "adapter=lora_xs",
        "adapter.rank=2",
        "schedule.rounds=2",
        "schedule.hash_every=1",
    )
    assert all(e["differing"] == [] for e in told(tmp_path / "run", "replicas"))
    assert rounds(tmp_path / "run")[-1]["update_norm"] > 0


CASES = {
    "moves": (*MOVES, "schedule.rounds=6"),
    "lost": ("network=uniform", "network.dropout=0.3", "schedule.rounds=5", "checkpoint_every=2"),
    "private": ("privacy=dp_zero", "schedule.rounds=4"),
}


@pytest.mark.parametrize("case", ["moves", *(pytest.param(c, marks=pytest.mark.slow) for c in ("lost", "private"))])
def test_a_killed_run_goes_on_to_the_same_end(tmp_path, case):
    more = (*ONE_BYTE, *CASES[case])
    total = moments(tmp_path / "whole", *more)
    for k in (total // 3, 2 * total // 3):
        killed_at(k, tmp_path / str(k), *more)
        resume(tmp_path / str(k), shared=SHARED, quiet=True)
        same_end(tmp_path / str(k), tmp_path / "whole")


def test_private_scalars_are_accounted_for(tmp_path):
    go(tmp_path / "run", *ONE_BYTE, "privacy=dp_zero", "privacy.epsilon=2", "schedule.rounds=5", "local.steps=3")
    said = read_run(tmp_path / "run")["privacy_statement"]
    assert said["mechanism"] == "DPZero at every peer" and said["relation"] == "adding or removing it"
    assert {row["steps"] for row in said["holders"]} == {15}
    assert 1.9 < said["epsilon"] <= 2
    assert all(r["loss"] is None and r["tokens"] == 0 for r in rounds(tmp_path / "run"))
    spent = [r["epsilon"] for r in rounds(tmp_path / "run")]
    assert spent == sorted(spent) and spent[-1] == said["epsilon"]
    assert all(e["differing"] == [] for e in told(tmp_path / "run", "replicas"))


def test_a_peer_whose_budget_is_spent_sends_no_more(tmp_path):
    words = (
        "privacy=dp_zero",
        "privacy.epsilon=2",
        "privacy.noise_multiplier=1",
        "schedule.rounds=40",
        "local.steps=3",
    )
    go(tmp_path / "run", *ONE_BYTE, *words, "evaluation.every=40")
    said, found = read_run(tmp_path / "run"), rounds(tmp_path / "run")
    assert len(found) < 40 and "budget" in said["final"]["stopped"]
    rows = said["privacy_statement"]["holders"]
    assert all(row["steps"] == row["limit"] for row in rows) and said["privacy_statement"]["epsilon"] <= 2
    # What the budgets allow in the last round may be fewer scalars than three.
    assert sum(r["client_steps"] for r in found) == sum(row["steps"] for row in rows)
    assert told(tmp_path / "run", "replicas")[-1]["round"] == found[-1]["round"]


REFUSED = {
    "another graph": (("topology=ring",), "topology", "everybody hears everybody"),
    "attackers": (("attack=faulty",), "attack", "none"),
    "a robust rule": (("aggregator.combine=krum", "aggregator.f=1"), "aggregator.combine", "auto"),
    "privacy of updates": (("privacy=dp_sgd",), "privacy", "dp_zero"),
    "another optimiser": (("local=adamw",), "local.optimizer", "sgd"),
    "momentum": (("local.optimizer.momentum=0.9",), "local.optimizer", "sgd"),
    "a local algorithm": (("local=fedprox",), "local", "plain"),
    "epochs": (("local.epochs=1",), "local.epochs", "null"),
    "too many directions": (("local.steps=256",), "local.steps", "255"),
    "clipping": (("local.clip_norm=1",), "local.clip_norm", "null"),
    "alternating factors": (("adapter=rolora",), "adapter", "always train"),
    "a start that changes the base": (("adapter=lora", "adapter/init=pissa"), "adapter/init", "base"),
    "secure aggregation": (("secure_aggregation=secaggplus",), "secure_aggregation", "none"),
    "a server's optimiser": (("server_optimizer=fedadam",), "server_optimizer", "sgd"),
    "some peers": (("clients.per_round=3",), "clients.per_round", "null"),
    "an unknown peer": (("schedule.leaves=[[2,9]]",), "schedule.leaves", "0 to 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_among_replicas_is_refused_before_anything_loads(case):
    words, key, text = REFUSED[case]
    settings = ["model=tiny-encoder", "data=tiny", "clients.number=4", *ONE_BYTE, *words]
    with pytest.raises(ConfigError, match=text) as refused:
        Settings.of(compose(settings)[0])
    assert refused.value.key == key


def test_scalars_privacy_is_for_scalars():
    with pytest.raises(ConfigError, match="dp_sgd") as refused:
        Settings.of(compose(["model=tiny-encoder", "data=tiny", "privacy=dp_zero"])[0])
    assert refused.value.key == "schedule"


BAD = {
    "no way of joining": ([[3, 1]], None, "replay or snapshot"),
    "an unknown way": ([[3, 1, "magic"]], None, "replay or snapshot"),
    "round 1": ([[1, 1, "replay"]], None, "from 2"),
    "no round": (None, [["a", 1]], "rounds from 2"),
    "twice": (None, [[3, 1], [5, 1]], "in turn"),
    "at once": ([[3, 1, "replay"]], [[3, 1]], "in turn"),
}


@pytest.mark.parametrize("case", BAD)
def test_joins_and_leaves_that_make_no_sense_are_refused(case):
    joins, leaves, text = BAD[case]
    with pytest.raises(ConfigError, match=text):
        JustOneByte(joins=joins, leaves=leaves)


def test_somebody_is_always_there():
    with pytest.raises(ConfigError, match="every round"):
        JustOneByte(leaves=[[4, 0], [4, 1]]).membership.check(2)
    JustOneByte(leaves=[[4, 0]], joins=[[4, 1, "replay"]]).membership.check(2)
