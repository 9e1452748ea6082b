"""Whole asynchronous runs of a tiny model: FedAvg on equal devices, replay, kill -9, budgets, and what is refused."""

from collections import Counter
from pathlib import Path

import pytest

from clients import trainer
from fl import checkpoint
from fl.compose import compose
from fl.engine.cohort_grid import CohortGrid, client_of
from fl.errors import ConfigError
from fl.experiment import Settings
from fl.records import read_run
from fl.run import resume
from tests.helpers import (
    DECODER,
    ENCODER,
    SHARED,
    clients,
    evaluations,
    final,
    go,
    metrics,
    rounds,
    same_metrics,
    weights,
)
from tests.test_resume import MOMENTUM, killed_at, moments, same_end

EQUAL = ("network=uniform", "network.latency_s=0", "network.down_mbps=null", "network.up_mbps=null",
         "network.seconds_per_step=0.5")  # fmt: skip
F80 = ("network=linear", "clients.number=6")
FIRST = ("schedule=fedbuff", "schedule.buffer=4", "schedule.rounds=4")


# Equal devices

SAME = {
    "fedbuff": (*FIRST, "aggregator.weights=uniform"),
    "fedbuff, by examples": (*FIRST, "schedule.weights=unbiased"),
    "fedfix": ("schedule=fedfix", "schedule.tick_s=1", "schedule.rounds=4"),
    "fedfix, long tick": ("schedule=fedfix", "schedule.tick_s=1.7", "schedule.rounds=4"),
}


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory):
    """The folder of a synchronous run with given settings; each is run once."""
    made: dict[tuple[str, ...], Path] = {}

    def of(*words: str) -> Path:
        if words not in made:
            made[words] = tmp_path_factory.mktemp("synchronous") / "run"
            go(made[words], *words)
        return made[words]

    return of


@pytest.mark.parametrize(
    ("case", "adapter"), [*[(case, "lora") for case in SAME], ("fedbuff", "ffa"), ("fedfix", "rolora")]
)
def test_with_equal_devices_a_run_is_fedavg_byte_for_byte(tmp_path, synchronous, case, adapter):
    common = (*EQUAL, f"adapter={adapter}", "partition=dirichlet", "partition.alpha=0.5", "evaluation.clients=always")
    common += ("aggregator=rolora",) if adapter == "rolora" else ()
    weighed = [word for word in SAME[case] if word.startswith("aggregator.")]
    sync = synchronous(*common, *weighed, "schedule.rounds=4")
    go(tmp_path / "run", *common, *SAME[case])
    assert weights(tmp_path / "run") == weights(sync)
    for mine, theirs in zip(rounds(tmp_path / "run"), rounds(sync), strict=True):
        for name in ("round", "version", "accepted", "loss", "update_norm", "client_steps", "tokens", "staleness"):
            assert mine[name] == theirs[name], name
    for split in ("test", "clients"):
        mine, theirs = (evaluations(folder, split) for folder in (tmp_path / "run", sync))
        assert [e["loss_mean" if split == "clients" else "loss"] for e in mine] == [
            e["loss_mean" if split == "clients" else "loss"] for e in theirs
        ]
    if case != "fedfix, long tick":
        assert final(tmp_path / "run")["virtual_s"] == final(sync)["virtual_s"] == 4.0


# Replay, and observers

DRAWING = ("clients.number=6", "clients.per_round=4", "partition=dirichlet", "network=lognormal", "network.dropout=0.2",
           "network.rejoin_s=0.3", "network.server_up_mbps=5", "network.availability=0.8",
           "network.availability_period_s=2", "local.steps=1", "adapter.dropout=0.1")  # fmt: skip
RUNS = {
    "fedasync": ("schedule=fedasync", "schedule.rounds=12"),
    "fedbuff": ("schedule=fedbuff", "schedule.buffer=3", "schedule.rounds=5"),
    "fedfix": ("schedule=fedfix", "schedule.rates=observed", "schedule.rounds=8", "schedule.tick_s=0.25"),
}


SOME = [name if name == "fedbuff" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]


@pytest.mark.parametrize("schedule", SOME)
def test_equal_seeds_give_the_same_bytes_and_others_another_run(tmp_path, schedule):
    words = (*DRAWING, *RUNS[schedule], "evaluation.every=0")
    for name in ("a", "b"):
        go(tmp_path / name, *words, shared=None if name == "b" else SHARED)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert same_metrics(tmp_path / "a", tmp_path / "b")
    go(tmp_path / "c", *words, "seed=1")
    assert weights(tmp_path / "c") != weights(tmp_path / "a")
    assert metrics(tmp_path / "c") != metrics(tmp_path / "a")


@pytest.mark.parametrize("schedule", ["fedasync", pytest.param("fedfix", marks=pytest.mark.slow)])
def test_who_looks_changes_nothing_but_their_own_events(tmp_path, schedule):
    words = (*DRAWING, *RUNS[schedule], "adapter=ffa")
    ways = {
        "seldom": ("evaluation.every=0", "evaluation.clients=never"),
        "always": ("evaluation.every=1", "evaluation.clients=always"),
        "by time": ("evaluation.every=0", "evaluation.every_s=0.1", "evaluation.clients=final"),
    }
    kept, looks = {}, {}
    for name, more in ways.items():
        go(tmp_path / name, *words, *more)
        kept[name] = [e for e in metrics(tmp_path / name) if e["event"] != "eval"], weights(tmp_path / name)
        looks[name] = len(evaluations(tmp_path / name))
    assert kept["seldom"] == kept["always"] == kept["by time"]
    assert looks["seldom"] == 2 < looks["by time"] <= looks["always"]


def test_a_run_of_a_language_model_replays_too(tmp_path):
    words = ("clients.number=4", *RUNS["fedbuff"], "network=linear")
    for name in ("a", "b"):
        go(tmp_path / name, *words, base=DECODER)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert same_metrics(tmp_path / "a", tmp_path / "b")
    assert final(tmp_path / "a")["perplexity"] > 1


def test_the_end_by_time_and_what_came_after_the_last_step(tmp_path):
    """The buffer is half full at the end. The run is complete, and what its clients sent is in their events."""
    words = (*F80, "schedule=fedbuff", "schedule.buffer=4", "schedule.rounds=500", "schedule.until_s=1.0")
    go(tmp_path / "run", *words)
    run = read_run(tmp_path / "run")
    assert run["status"] == "completed"
    assert (run["final"]["virtual_s"], run["final"]["stopped"]) == (1.0, None)
    steps, heard = rounds(tmp_path / "run"), clients(tmp_path / "run")
    assert len(steps) == len(heard) // 4 > 1
    assert len(heard) % 4
    assert sum(e["accepted"] for e in steps) == 4 * len(steps)
    assert max(e["virtual_s"] for e in heard) <= 1.0
    assert evaluations(tmp_path / "run")[-1]["round"] == len(steps)


def test_events_of_a_step_are_the_sum_of_its_clients(tmp_path):
    go(tmp_path / "run", *DRAWING, *RUNS["fedbuff"])
    mine: list = []
    total = Counter()
    for event in metrics(tmp_path / "run"):
        if event["event"] == "client":
            mine.append(event)
        elif event["event"] == "round":
            for name, source in (("bytes_down", "bytes_down"), ("bytes_up", "bytes_up"), ("client_steps", "steps")):
                assert event[name] == sum(e[source] or 0 for e in mine)
                total[name] += event[name]
                assert event[f"{name}_total"] == total[name]
            assert event["sampled"] == len(mine)
            assert event["accepted"] == sum(e["accepted"] for e in mine) == 3
            assert event["rejected"] == Counter(e["reason"] for e in mine if e["reason"])
            good = [e for e in mine if e["accepted"]]
            assert event["loss"] == pytest.approx(sum(e["loss"] for e in good) / 3)
            assert event["staleness"] == pytest.approx(sum(e["staleness"] for e in good) / 3)
            mine = []
    assert total["client_steps"] == final(tmp_path / "run")["client_steps"]


# Cohorts of several versions


@pytest.fixture
def trained(monkeypatch) -> list[list[list[int]]]:
    """Of each call of the trainer, its cohorts: a number for each job, equal where jobs start from the same state."""
    calls: list[list[list[int]]] = []
    grouped = trainer.cohorts

    def watching(works, *arguments):
        groups = grouped(works, *arguments)
        starts = {w.start.tobytes(): i for i, w in enumerate(works)}
        calls.append([[starts[works[i].start.tobytes()] for i in group] for group in groups])
        return groups

    monkeypatch.setattr(trainer, "cohorts", watching)
    return calls


@pytest.mark.parametrize("adapter", ["lora", "ffa", "lora_xs"])
def test_jobs_of_several_versions_train_in_one_cohort(tmp_path, trained, adapter):
    """Also where a factor is frozen: it is the same in all versions."""
    words = ("clients.number=8", "network=linear", "network.latency_s=0", "local.steps=1", "evaluation.every=0")
    go(tmp_path / "run", *words, "schedule=fedasync", "schedule.rounds=24", f"adapter={adapter}", "model.head_std=0.02")
    later = [cohort for call in trained[1:] for cohort in call]
    assert max(len(set(cohort)) for cohort in later) >= 3
    assert sum(map(len, later)) / len(later) > 2.5


def test_outstanding_work_may_start_from_many_changed_bases(tmp_path, trained):
    """A residual rule changes the base with every version, so each version has cohorts of its own."""
    words = ("clients.number=20", "network=linear", "network.latency_s=0", "local.steps=2", "evaluation.every=0")
    plain = ("schedule=fedbuff", "schedule.buffer=2", "aggregator.staleness=constant", "aggregator=fedex")
    go(tmp_path / "run", *words, *plain, "schedule.rounds=16", "model.head_std=0.02")
    assert final(tmp_path / "run")["rejected"] == {}
    assert max(len({version for cohort in call for version in cohort}) for call in trained) > 5
    assert all(len(set(cohort)) == 1 for call in trained for cohort in call)


# Kill -9

LIVE = ("clients.number=5", "clients.per_round=4", "local.steps=1", "network=lognormal", "network.dropout=0.2",
        "network.rejoin_s=0.2", "network.server_up_mbps=2", "network.server_down_mbps=2", "network.availability=0.7",
        "network.availability_period_s=1.5")  # fmt: skip
KILLED = {
    "fedasync": (*LIVE, *RUNS["fedasync"], "adapter.dropout=0.1"),
    "fedasync, delta, rolora": (
        *LIVE, *RUNS["fedasync"], "schedule.mode=delta", "adapter=rolora", "aggregator=rolora",
        "aggregator.staleness=dc_asgd",
    ),
    "fedbuff, ffa": (*LIVE, *RUNS["fedbuff"], "adapter=ffa", "server_optimizer=fedadam"),
    "fedbuff, client memory": (*LIVE, *RUNS["fedbuff"], MOMENTUM, "checkpoint_every=2", "evaluation.every=3"),
    "fedfix, fedsvd": (*LIVE, *RUNS["fedfix"], "adapter=ffa", "aggregator=fedsvd"),
    # rates=model is reckoned from the bytes of a job, and those of rolora change from phase to phase
    "fedfix, rolora, rates of the model": (
        "clients.number=3", "local.steps=1", "network=linear", "network.up_mbps=1", "schedule=fedfix",
        "schedule.rounds=9", "schedule.tick_s=0.11", "adapter=rolora", "aggregator=rolora",
    ),
    "fedbuff, dp_sgd": (
        *LIVE, *RUNS["fedbuff"], "privacy=dp_sgd", "privacy.noise_multiplier=1", "privacy.epsilon=null",
        "privacy.delta=1e-3",
    ),
    "by time": (*LIVE, *RUNS["fedbuff"], "schedule.rounds=50", "schedule.until_s=1.5", "evaluation.every_s=0.4"),
}  # fmt: skip


QUICK = ("fedasync, delta, rolora", "fedbuff, ffa", "fedfix, fedsvd", "fedfix, rolora, rates of the model")


@pytest.mark.parametrize("part", [0.6, pytest.param(0.35, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in KILLED])
def test_kill_9_and_resume_ends_the_same(tmp_path, case, part):
    words = KILLED[case]
    total = moments(tmp_path / "whole", *words)
    assert read_run(tmp_path / "whole")["status"] == "completed"
    killed_at(int(part * total), tmp_path / "run", *words)
    before = checkpoint.load(tmp_path / "run" / "checkpoint")[1]
    assert before["server"]["round"] < read_run(tmp_path / "whole")["final"]["rounds"]
    assert part < 0.5 or before["schedule"]["out"]  # work was on its way
    resume(tmp_path / "run", shared=SHARED, quiet=True)
    same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", RUNS)
def test_kill_9_at_any_moment_of_an_asynchronous_run(tmp_path, schedule):
    words = (*LIVE, *RUNS[schedule])
    total = moments(tmp_path / "whole", *words)
    tried = 0
    for k in range(8, total - 3, 5):
        folder = tmp_path / str(k)
        killed_at(k, folder, *words)
        if not (folder / "checkpoint").is_dir() or (read_run(folder) or {}).get("status") != "interrupted":
            continue
        resume(folder, shared=SHARED, quiet=True)
        same_end(folder, tmp_path / "whole")
        tried += 1
    assert tried > 5


# Budgets


def train_pushes(monkeypatch) -> Counter:
    """How many training messages each client is sent."""
    seen: Counter = Counter()
    push = CohortGrid.push_messages

    def pushing(self, messages):
        messages = list(messages)
        seen.update(client_of(m.metadata.dst_node_id) for m in messages if m.metadata.message_type == "train")
        return push(self, messages)

    monkeypatch.setattr(CohortGrid, "push_messages", pushing)
    return seen


def books(folder: Path) -> dict[int, int]:
    """Steps in the book of each client."""
    return {int(c): book["steps"] for c, book in checkpoint.load(folder / "checkpoint")[1]["privacy"].items()}


PRIVATE = ("privacy=dp_sgd", "privacy.delta=1e-3", *F80, "local.steps=2")


@pytest.mark.parametrize("schedule", SOME)
def test_books_hold_the_steps_of_the_jobs_that_were_done(tmp_path, monkeypatch, schedule):
    jobs = train_pushes(monkeypatch)
    more = ("network.dropout=0.2",)
    go(tmp_path / "run", *PRIVATE, *RUNS[schedule], *more, "privacy.noise_multiplier=1", "privacy.epsilon=null")
    assert books(tmp_path / "run") == {c: 2 * jobs[c] for c in range(6)}
    heard = Counter(e["client"] for e in clients(tmp_path / "run") if e["accepted"])
    assert all(jobs[c] >= heard[c] for c in range(6))
    assert all(e["loss"] is None for e in clients(tmp_path / "run"))
    spent = [e["epsilon"] for e in rounds(tmp_path / "run")]
    assert spent == sorted(spent) and spent[-1] > spent[0] > 0


def test_all_that_a_budget_allows_is_used_before_the_run_ends(tmp_path, monkeypatch):
    """Work on its way was computed with the rest, so its cost is in the books before it arrives."""
    jobs = train_pushes(monkeypatch)
    words = (*PRIVATE, "schedule=fedasync", "schedule.rounds=60", "privacy.epsilon=9", "privacy.noise_multiplier=0.7")
    go(tmp_path / "run", *words)
    run, done = read_run(tmp_path / "run"), books(tmp_path / "run")
    assert run["status"] == "completed"
    assert run["final"]["stopped"] == "every client has spent its privacy budget"
    assert 8 < run["final"]["epsilon"] <= 9
    assert set(done.values()) == {8}  # four jobs of two steps
    heard = Counter(e["client"] for e in clients(tmp_path / "run") if e["accepted"])
    assert heard == dict.fromkeys(range(6), 4)
    assert len(rounds(tmp_path / "run")) == 24
    # Who has spent its budget while others have not is asked once more, says so, and takes part no more.
    refused = Counter(e["client"] for e in clients(tmp_path / "run") if e["reason"] == "budget")
    assert refused and set(refused.values()) == {1}
    assert jobs == {c: 4 + refused[c] for c in range(6)}


def test_a_client_is_not_asked_more_often_than_its_noise_is_for(tmp_path, monkeypatch):
    """schedule.rounds bounds the jobs of each client, and the noise of the whole run is set for as many."""
    jobs = train_pushes(monkeypatch)
    words = (*PRIVATE, "privacy.epsilon=8", "schedule=fedfix", "schedule.rates=observed", "schedule.tick_s=0.2")
    go(tmp_path / "run", *words, "schedule.rounds=5", "clients.number=2")
    assert max(jobs.values()) <= 5
    assert final(tmp_path / "run")["epsilon"] <= 8
    assert final(tmp_path / "run")["stopped"] is None


# What is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sampling=poisson",), r"sampling='Poisson' is not allowed: fixed or available"),
        (
            ("sampling.over_selection=0.5",),
            r"sampling='Fixed' is not allowed: fixed or available with over_selection=0",
        ),
        (("aggregator=flora",), r"aggregator='FLoRA' is not allowed: a rule of the mean update alone"),
        (("aggregator=fedex",), r"aggregator='FedEx' is not allowed: a rule of the mean update alone"),
        (("aggregator=flexlora",), r"aggregator='FlexLoRA' is not allowed: a rule of the mean update alone"),
        (("aggregator=hetlora",), r"aggregator='HetLoRA' is not allowed: a rule of the mean update alone"),
        (("evaluation.aggregation_error=true",), r"evaluation\.aggregation_error=True is not allowed: false with"),
        (("secure_aggregation=secagg", "aggregator.weights=uniform"), r"is not allowed: a schedule in rounds"),
        (("secure_aggregation=shares", "aggregator.weights=uniform"), r"is not allowed: a schedule in rounds"),
        *[
            (
                (f"privacy={name}", "privacy.epsilon=8", "aggregator.weights=uniform"),
                r"is not allowed: synchronous with",
            )
            for name in ("central", "distributed", "dp_ftrl", "dp_brem", "dp_brem_plus")
        ],
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_what_does_not_go_with_asynchronous_schedules(words, said):
    settings = compose([*ENCODER, "schedule=fedfix", *words])[0]
    for schedule in ("FedAsync", "FedBuff", "FedFix"):
        chosen = {"_target_": f"fl.schedules.{schedule.lower()}.{schedule}"}
        with pytest.raises(ConfigError, match=said):
            Settings.of({**settings, "schedule": chosen})


def test_models_of_changing_tensors_do_not_mix():
    words = ("schedule=fedasync", "aggregator=fedsvd", "adapter=ffa")
    with pytest.raises(ConfigError, match=r"schedule\.mode='mix' is not allowed: delta: FedSVD changes"):
        Settings.of(compose([*ENCODER, *words])[0])
    Settings.of(compose([*ENCODER, *words, "schedule.mode=delta"])[0])


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_a_plain_mean_goes_with_every_rule(rule):
    plain = ("schedule=fedbuff", "aggregator.staleness=constant", f"aggregator={rule}")
    Settings.of(compose([*ENCODER, *plain])[0])
    each = ("schedule=fedasync", "schedule.mode=delta", "schedule.alpha=1", "aggregator.staleness=constant")
    Settings.of(compose([*ENCODER, *each, f"aggregator={rule}"])[0])
    for more in (("schedule.weights=unbiased",), ("aggregator.staleness=hinge",), ("aggregator.staleness=polynomial",)):
        with pytest.raises(ConfigError, match="a rule of the mean update alone"):
            Settings.of(compose([*ENCODER, *plain, *more])[0])


def test_unbiased_weights_of_the_model_need_clients_at_work_all_the_time(tmp_path):
    words = (*F80, "schedule=fedbuff", "schedule.weights=unbiased", "network.dropout=0.1")
    with pytest.raises(ConfigError, match=r"schedule\.rates='model' is not allowed: observed, unless all clients"):
        go(tmp_path / "run", *words)
    go(tmp_path / "other", *words, "schedule.rates=observed", "schedule.rounds=2")


# What clients hold, and data that all hold


def test_what_a_client_holds_is_not_sent_again(tmp_path):
    """A frozen A goes down with a client's first job, and not with the next."""
    go(tmp_path, *F80, "adapter=ffa", "schedule=fedasync", "schedule.rounds=24")
    sizes: dict[int, list[int]] = {}
    for event in clients(tmp_path):
        sizes.setdefault(event["client"], []).append(event["bytes_down"])
    several = [found for found in sizes.values() if len(found) > 1]
    assert len(several) >= 3
    for first, *later in several:
        assert max(later) < 0.8 * first and max(later) - min(later) < 20


def test_data_that_all_hold_have_no_privacy_claim():
    words = [*ENCODER, "partition=replicated", "privacy=local", "aggregator.weights=uniform"]
    with pytest.raises(ConfigError, match=r"partition='Replicated'.*what all hold is nobody's own"):
        Settings.of(compose(words)[0])


@pytest.mark.parametrize("schedule", ["synchronous", "fedasync"])
def test_a_rule_for_stale_updates_is_checked_under_every_schedule(schedule):
    words = [*ENCODER, f"schedule={schedule}", "aggregator.staleness=inversion", "local=adamw"]
    with pytest.raises(ConfigError, match="local"):
        Settings.of(compose(words)[0])
