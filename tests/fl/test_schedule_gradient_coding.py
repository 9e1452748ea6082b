"""Runs with coded gradients: gradient descent whatever the scheme, in the time that the wait rule takes."""

import numpy as np
import pytest

from fl.coding import jobs
from fl.compose import compose
from fl.errors import ConfigError
from fl.experiment import Settings
from fl.run import resume
from tests.helpers import SHARED, clients, evaluations, go, metrics, rounds, vector
from tests.test_resume import killed_at, moments, same_end

CODED = (
    "schedule=gradient_coding",
    "partition=replicated",
    "data.client_test_fraction=0",
    "clients.number=6",
    "local=sgd",
    "local.lr=0.5",
    "local.batch_size=4",
    "network=gilbert_elliott",
)
SCHEMES = {
    "uncoded": ("schedule.scheme=uncoded",),
    "gc": ("schedule.scheme=gc", "schedule.tolerated=2"),
    "gc cyclic": ("schedule.scheme=gc", "schedule.tolerated=2", "schedule.code=cyclic"),
    "sr_sgc": ("schedule.scheme=sr_sgc", "schedule.tolerated=3"),
    "m_sgc": ("schedule.scheme=m_sgc", "schedule.tolerated=2"),
    "m_sgc of three": ("schedule.scheme=m_sgc", "schedule.tolerated=2", "schedule.burst=2", "schedule.window=3"),
}
DELAY = {"sr_sgc": 1, "m_sgc": 1, "m_sgc of three": 3}
SAMPLES, STEPS = 192, 3


@pytest.fixture(scope="module")
def descent(tmp_path_factory):
    """Three steps of gradient descent by the synchronous schedule: one client, and all samples in its one batch."""
    folder = tmp_path_factory.mktemp("descent") / "run"
    words = ("clients.number=1", "data.client_test_fraction=0", "local=sgd", "local.lr=0.5", "local.steps=1")
    go(folder, *words, f"local.batch_size={SAMPLES}", f"schedule.rounds={STEPS}")
    return folder


@pytest.mark.parametrize("scheme", [*list(SCHEMES)[:-1], pytest.param("m_sgc of three", marks=pytest.mark.slow)])
def test_every_scheme_is_gradient_descent(tmp_path, descent, scheme):
    models = DELAY.get(scheme, 0) + 1
    go(tmp_path / "run", *CODED, *SCHEMES[scheme], f"schedule.rounds={STEPS * models}")
    mine, plain = vector(tmp_path / "run"), vector(descent)
    assert np.linalg.norm(mine - plain) < 1e-4 * np.linalg.norm(plain)
    own = [r for r in rounds(tmp_path / "run") if r["model"] == 0]
    assert [r["loss"] for r in own] == pytest.approx([r["loss"] for r in rounds(descent)], rel=1e-5)
    assert [r["version"] for r in own] == [1, 2, 3]
    found, right = evaluations(tmp_path / "run")[-1], evaluations(descent)[-1]
    assert found["loss"] == pytest.approx(right["loss"], rel=1e-4)


def test_each_gradient_is_computed_once_and_only_if_it_is_waited_for(tmp_path, monkeypatch):
    """Three jobs of 192 samples are 576 samples' gradients, though workers' loads add up to more."""
    from clients.trainer import Trainer

    seen, whole = [], Trainer.gradients
    monkeypatch.setattr(Trainer, "gradients", lambda self, calls: seen.extend(calls) or whole(self, calls))
    go(tmp_path / "run", *CODED, *SCHEMES["gc"], "schedule.rounds=3", "network.p_gb=0.3")
    assert sum(len(e) for _, examples, _ in seen for e in examples) == 3 * SAMPLES
    assert any(c["reason"] == "late" for c in clients(tmp_path / "run"))


def test_models_take_turns_and_only_the_first_is_the_run_s(tmp_path):
    decay = ("local.lr_schedule=step", "local.lr_step_rounds=1", "local.lr_gamma=0.5")
    go(tmp_path / "run", *CODED, *SCHEMES["uncoded"], "schedule.rounds=8", "schedule.models=3", *decay)
    found = rounds(tmp_path / "run")
    assert [r["model"] for r in found] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [r["version"] for r in found] == [1, 1, 1, 2, 2, 2, 3, 3]
    # The learning rate is that of a model's own steps: half of it with each.
    lengths = [r["update_norm"] for r in found]
    assert all(lengths[k + 3] < 0.6 * lengths[k] for k in range(5))
    # A head of zeros over B = 0 makes a model's first two losses the same whatever A is, and the third its own.
    assert found[3]["loss"] == found[4]["loss"] and found[6]["loss"] != found[7]["loss"]


def test_a_round_takes_the_wait_rule_s_time(tmp_path):
    """Equal workers, one of which is slow: GC cuts it off at 1 + mu times the others' time, uncoded waits for it."""
    words = ("network=uniform", "network.slow_clients=[4]", "network.slow_factor=3", "network.latency_s=0",
             "network.down_mbps=null", "network.up_mbps=null", "network.seconds_per_step=0.5")  # fmt: skip
    go(tmp_path / "gc", *CODED, *words, *SCHEMES["gc"], "schedule.rounds=2", "schedule.mu=0.25")
    # A worker's three of six chunks are 96 samples: 24 steps of 4, 12 s.
    assert [r["virtual_s"] for r in rounds(tmp_path / "gc")] == [15.0, 30.0]
    asked = clients(tmp_path / "gc", 2)
    assert [c["client"] for c in asked] == [0, 1, 2, 3, 5, 4]
    assert [c["reason"] for c in asked] == [None] * 5 + ["late"]
    assert [(c["virtual_s"], c["done_s"], c["sent_s"]) for c in asked[-2:]] == [(27.0, 27.0, 15.0), (30.0, 30.0, 15.0)]
    assert [c["steps"] for c in asked] == [24] * 5 + [None]
    go(tmp_path / "uncoded", *CODED, *words, *SCHEMES["uncoded"], "schedule.rounds=2")
    assert [r["virtual_s"] for r in rounds(tmp_path / "uncoded")] == [12.0, 24.0]  # 8 steps of the slow one


def test_what_a_round_says(tmp_path):
    go(tmp_path / "run", *CODED, *SCHEMES["m_sgc"], "schedule.rounds=6", "network.p_gb=0.2", "network.p_bg=0.9")
    found = rounds(tmp_path / "run")
    assert [r["round"] for r in found] == [1, 2, 3, 4, 5, 6]
    work = clients(tmp_path / "run")
    assert {c["round"] for c in work} == set(range(1, 8))  # a job more than there are jobs: T = 1
    for name in ("bytes_down", "bytes_up"):
        assert sum(r[name] for r in found) == sum(c[name] for c in work)
    assert sum(r["client_steps"] for r in found) == sum(c["steps"] or 0 for c in work)
    assert sum(r["sampled"] for r in found) == len(work)
    late = [c for c in work if not c["accepted"]]
    assert late and all((c["reason"], c["bytes_up"], c["steps"]) == ("late", 0, None) for c in late)
    assert sum(r["rejected"].get("late", 0) for r in found) == len(late)
    assert {r["live_versions"] for r in found} == {2, 1} and found[-1]["live_versions"] == 1
    assert all(r["decoded"] and r["staleness"] == 0.0 for r in found)
    # A worker's answer holds a float64 for each number that trains, and the loss, for each of its two tasks.
    trained = len(vector(tmp_path / "run"))
    assert max(c["bytes_up"] for c in work) == pytest.approx(2 * 8 * (trained + 1), rel=0.02)
    events = metrics(tmp_path / "run")
    times = [e["virtual_s"] for e in events]
    assert times == sorted(times)


def test_only_the_results_of_open_jobs_are_kept(tmp_path, monkeypatch):
    kept, whole = [], jobs.Jobs.step

    def step(self, job):
        event = whole(self, job)
        kept.append({result[0] for result in self.results})
        return event

    monkeypatch.setattr(jobs.Jobs, "step", step)
    go(tmp_path / "run", *CODED, *SCHEMES["m_sgc"], "schedule.rounds=4")
    assert kept == [{2}, {3}, {4}, set()]


def test_a_job_that_cannot_be_decoded_is_said_and_takes_no_step(tmp_path):
    go(tmp_path / "run", *CODED, *SCHEMES["uncoded"], "schedule.rounds=6", "network.dropout=0.05")
    found = rounds(tmp_path / "run")
    lost = [r for r in found if not r["decoded"]]
    assert 0 < len(lost) < 6
    assert all(r["loss"] is None and r["update_norm"] == 0 and r["rejected"]["error"] > 0 for r in lost)
    assert found[-1]["version"] == 6 - len(lost)
    assert all(c["reason"] == "error" for c in clients(tmp_path / "run") if not c["accepted"])


def test_dropped_work_is_tolerated_as_late_work_is(tmp_path):
    go(tmp_path / "run", *CODED, *SCHEMES["gc"], "schedule.rounds=6", "network.dropout=0.1", "network.p_gb=0")
    assert any(r["rejected"].get("error") for r in rounds(tmp_path / "run"))
    assert all(r["decoded"] for r in rounds(tmp_path / "run"))


def test_workers_that_are_away_are_late_and_all_away_is_waited_for(tmp_path):
    words = ("network=uniform", "network.availability=0.6", "network.availability_period_s=20")
    go(tmp_path / "run", *CODED, *words, *SCHEMES["gc"], "schedule.rounds=12")
    found = rounds(tmp_path / "run")
    assert any(r["sampled"] < 6 for r in found)
    assert any(not r["decoded"] for r in found) and any(r["decoded"] for r in found)


def test_a_sum_that_is_not_finite_is_not_used(tmp_path, monkeypatch):
    from fl.coding.workers import Workers

    whole = Workers._reply

    def broken(self, request, shares, size):
        reply = whole(self, request, shares, size)
        if request.client == 3:
            reply.arrays["coded/0"][7] = np.inf
        return reply

    monkeypatch.setattr(Workers, "_reply", broken)
    go(tmp_path / "run", *CODED, *SCHEMES["gc"], "schedule.rounds=2", "network.p_gb=0")
    assert [r["rejected"] for r in rounds(tmp_path / "run")] == [{"not_finite": 1}] * 2
    assert all(r["decoded"] for r in rounds(tmp_path / "run"))


def test_a_step_above_the_bound_is_not_taken(tmp_path):
    go(tmp_path / "run", *CODED, *SCHEMES["gc"], "schedule.rounds=2", "schedule.max_update_norm=1e-3")
    found = [(r["rejected"]["too_large"], r["update_norm"], r["version"]) for r in rounds(tmp_path / "run")]
    assert found == [(1, 0, 0)] * 2


@pytest.mark.parametrize("adapter", ["ffa", "lora_xs"])
def test_only_what_trains_is_coded(tmp_path, adapter):
    words = (*CODED, *SCHEMES["m_sgc"], f"adapter={adapter}", "schedule.rounds=4", "local.lr=0.1")
    if adapter == "lora_xs":
        with pytest.raises(ConfigError, match="adapter/init"):
            go(tmp_path / "run", *words)
        return
    go(tmp_path / "run", *words)
    losses = [r["loss"] for r in rounds(tmp_path / "run") if r["model"] == 0]
    assert losses[1] < losses[0]


CASES = {
    "gc": SCHEMES["gc"],
    "sr_sgc": (*SCHEMES["sr_sgc"], "network.p_gb=0.4"),
    "m_sgc": (*SCHEMES["m_sgc of three"], "server_optimizer=fedadam", "network.server_up_mbps=1"),
    "dropout, seldom saved": (*SCHEMES["m_sgc"], "adapter.dropout=0.2", "checkpoint_every=3", "network.dropout=0.1"),
}


@pytest.mark.parametrize(
    "case", ["m_sgc", *(pytest.param(c, marks=pytest.mark.slow) for c in ("gc", "sr_sgc", "dropout, seldom saved"))]
)
def test_a_killed_run_goes_on_to_the_same_end(tmp_path, case):
    more = (*CODED, *CASES[case], "schedule.rounds=6")
    total = moments(tmp_path / "whole", *more)
    for k in (total // 2, 4 * total // 5):
        killed_at(k, tmp_path / str(k), *more)
        resume(tmp_path / str(k), shared=SHARED, quiet=True)
        same_end(tmp_path / str(k), tmp_path / "whole")


@pytest.mark.slow
def test_the_cohort_s_size_is_no_matter(tmp_path):
    go(tmp_path / "one", *CODED, *SCHEMES["m_sgc"], "schedule.rounds=4", "engine.cohort_size=1")
    go(tmp_path / "two", *CODED, *SCHEMES["m_sgc"], "schedule.rounds=4", "engine.cohort_size=8")
    one, two = vector(tmp_path / "one"), vector(tmp_path / "two")
    assert np.linalg.norm(one - two) < 1e-4 * np.linalg.norm(one)


REFUSED = {
    "private data": (("partition=iid",), "partition", "never copied"),
    "privacy": (("privacy=local", "privacy.epsilon=1"), "privacy", "none"),
    "secure aggregation": (("secure_aggregation=secaggplus",), "secure_aggregation", "none"),
    "attackers": (("attack=faulty",), "attack", "none"),
    "test sets of clients' own": (("data.client_test_fraction=0.1",), "data.client_test_fraction", "0"),
    "over-selection": (("sampling.over_selection=0.5",), "sampling", "all workers"),
    "some workers": (("clients.per_round=3",), "clients.per_round", "null"),
    "another rule": (("aggregator=fedex",), "aggregator", "fedavg"),
    "stale weights": (("aggregator.staleness=polynomial",), "aggregator.staleness", "auto"),
    "local steps": (("local=fedprox",), "local", "takes no step"),
    "clipping": (("local.clip_norm=1",), "local.clip_norm", "null"),
    "alternating factors": (("adapter=rolora", "aggregator=rolora"), "aggregator", "fedavg"),
    "a start that changes the base": (("adapter/init=pissa",), "adapter/init", "no start"),
    "aggregation error": (("evaluation.aggregation_error=true",), "evaluation.aggregation_error", "false"),
    "too few models": (("schedule.models=1",), "schedule.models", "at least 2"),
    "a bad window": (("schedule.window=1",), "schedule.scheme", "can be built"),
    "too many stragglers": (("schedule.tolerated=7",), "schedule.scheme", "can be built"),
    "no groups": (("schedule.tolerated=3", "schedule.code=fractional"), "schedule.scheme", "can be built"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_coded_is_refused_before_anything_loads(case):
    words, key, text = REFUSED[case]
    settings = ["model=tiny-encoder", "data=tiny", *CODED, *SCHEMES["m_sgc"], *words]
    with pytest.raises(ConfigError, match=text) as refused:
        Settings.of(compose(settings)[0])
    assert refused.value.key == key


def test_more_chunks_than_samples_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="chunks one of the 20 samples"):
        go(tmp_path / "run", *CODED, *SCHEMES["m_sgc"], "data.max_train=20")


def test_starts_keep_zeros_and_the_spread_of_the_rest(tmp_path):
    """The other models' starts: tensors of one value stay, and others have its mean and standard deviation."""
    from clients.adapters.space import Space
    from clients.layout import Layout
    from fl.state import ServerState

    space = Space(Layout(("a", "b", "ones"), ((4000,), (5,), (3,))))
    first = np.concatenate([np.linspace(1, 3, 4000), np.zeros(5), np.ones(3)]).astype(np.float32)
    world = type("World", (), {"server": ServerState(first, space), "seed": 3})()
    one, two = jobs._start(world, 1).vector, jobs._start(world, 2).vector
    assert (one[4000:] == first[4000:]).all() and (one[:4000] != two[:4000]).any()
    # 4000 draws: both within 8 standard errors, which a right program misses with probability below 1e-14.
    std = first[:4000].std()
    assert abs(one[:4000].mean() - 2) < 8 * std / 4000**0.5
    assert abs(one[:4000].std() / std - 1) < 8 / 8000**0.5
