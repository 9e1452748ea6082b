"""Choosing a plan: by measured times given here, never by a clock."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable

import pytest
import torch

from clients import tuning
from clients.local.optimizers import AdamW
from clients.pool import available
from clients.trainer import Plan
from clients.tuning import Probe, Resources, choose
from fl.config import build as build_settings
from fl.errors import ConfigError
from tests.oracles.cohorts import build
from tests.oracles.models import batches

AUTO = Resources(device="cpu")
Times = Callable[[Plan, int], float]


class FakeProbe:
    """Says how long a client step takes, and remembers what it was asked."""

    def __init__(self, times: Times = lambda plan, slots: 1.0):
        self.times, self.asked = times, []

    def seconds(self, plan: Plan, slots: int) -> float:
        self.asked.append((plan.dtype, plan.attention, slots, plan.workers, plan.threads))
        return self.times(plan, slots)


class FakePool:
    """Runs the tasks here instead of in children."""

    def __init__(self, worker, processes, threads):
        self.worker, self.processes, self.threads = worker, processes, threads

    def run(self, tasks):
        return [getattr(self.worker, method)(*arguments) for method, arguments in tasks]

    def close(self):
        pass


@pytest.fixture(autouse=True)
def machine(cache, monkeypatch):
    """Four processors with bfloat16 and no fork; a cache of its own. Tests change what they are about."""
    monkeypatch.setattr(tuning, "processors", lambda: 4)
    monkeypatch.setattr(tuning, "bfloat16_pays", lambda device: True)
    monkeypatch.setattr(tuning, "available", lambda: False)
    monkeypatch.setattr(tuning.torch, "set_num_threads", lambda n: None)
    return monkeypatch


@pytest.fixture
def forks(machine):
    machine.setattr(tuning, "available", lambda: True)
    machine.setattr(tuning, "Pool", FakePool)


def plan_for(times: Times, wanted: Resources = AUTO, jobs: int = 8) -> Plan:
    return choose(wanted, FakeProbe(times), jobs, ["shape"], lambda text: None)


def sized(**seconds: float) -> Times:
    """Times of a client step by cohort size, as ``s4=0.5``; what is not named takes as long as S = 1."""
    return lambda plan, slots: seconds.get(f"s{slots}", 1.0)


@pytest.mark.parametrize(
    ("single", "half", "dtype"),
    [(1.15, 1.0, "bfloat16"), (1.14, 1.0, "float32"), (3.0, 1.0, "bfloat16"), (0.9, 1.0, "float32")],
)
def test_bfloat16_has_to_gain_15_percent(single, half, dtype):
    assert plan_for(lambda plan, slots: single if plan.dtype == "float32" else half).dtype == dtype


def test_bfloat16_is_not_tried_where_the_processor_has_none(machine):
    machine.setattr(tuning, "bfloat16_pays", lambda device: False)
    probe = FakeProbe(lambda plan, slots: 0.1 if plan.dtype == "bfloat16" else 1.0)
    assert choose(AUTO, probe, 8, [], lambda text: None).dtype == "float32"
    assert {dtype for dtype, *_ in probe.asked} == {"float32"}


@pytest.mark.parametrize(
    "error", [ConfigError("engine.dtype", "bfloat16", "float32"), RuntimeError("no kernel")], ids=repr
)
def test_bfloat16_is_not_chosen_where_it_fails_unless_asked_for(error):
    def times(plan: Plan, slots: int) -> float:
        if plan.dtype == "bfloat16":
            raise error
        return 1.0

    assert plan_for(times).dtype == "float32"
    with pytest.raises(type(error)):
        plan_for(times, Resources(device="cpu", dtype="bfloat16"))


def test_what_fails_in_float32_too_is_raised():
    def times(plan: Plan, slots: int) -> float:
        raise ConfigError("adapter", plan.dtype, "something else")

    with pytest.raises(ConfigError, match="adapter='float32'"):
        plan_for(times)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_chosen_for_each_precision(dtype, attention):
    plan = plan_for(lambda plan, slots: 0.5 if (plan.dtype, plan.attention) == (dtype, attention) else 1.0)
    assert (plan.dtype, plan.attention) == (dtype, attention)


@pytest.mark.parametrize(
    ("times", "jobs", "size"),
    [
        (sized(), 8, 1),
        (sized(s2=0.9, s4=0.8, s8=0.7), 8, 8),
        (sized(s2=0.9, s4=0.8, s8=0.7, s16=0.6), 8, 8),  # no more slots than jobs
        (sized(s2=0.9, s4=0.8, s8=0.7, s16=0.6, s32=0.5), 64, 16),  # nor than 16 on a CPU
        (sized(s2=0.98, s4=0.98), 8, 1),  # less than 3 percent is no gain
        (sized(s2=1.5, s4=0.8), 8, 4),  # one miss is forgiven
        (sized(s2=1.5, s4=1.5, s8=0.1), 8, 1),  # two end the search
        (sized(s2=0.5), 1, 1),
    ],
    ids=range(8),
)
def test_cohorts_grow_while_a_client_step_gets_cheaper(times, jobs, size):
    assert plan_for(times, jobs=jobs).cohort_size == size


def test_cohorts_stop_growing_before_memory_does():
    def times(plan: Plan, slots: int) -> float:
        if slots == 4:
            raise torch.OutOfMemoryError("full")
        return 1 / slots

    assert plan_for(times).cohort_size == 2


def test_all_threads_are_taken_only_where_they_pay():
    assert plan_for(lambda plan, slots: 1 / plan.threads).threads == 4
    assert plan_for(lambda plan, slots: plan.threads, jobs=7).threads == 1


def test_worker_processes_share_the_time_and_are_taken_where_that_pays(forks):
    # Four workers slow one another down by a half, and still do four times the work.
    crowded = plan_for(lambda plan, slots: 1.0 if plan.workers * plan.threads == 1 else 1.5)
    assert (crowded.workers, crowded.threads) == (4, 1)
    # By five: one process alone is better.
    jammed = plan_for(lambda plan, slots: 1.0 if plan.workers * plan.threads == 1 else 5.0, jobs=7)
    assert (jammed.workers, jammed.threads) == (1, 1)


def test_with_several_workers_a_cohort_is_no_larger_than_a_workers_share(forks):
    assert plan_for(lambda plan, slots: 1 / slots, jobs=8).cohort_size == 2
    fixed = Resources(device="cpu", workers=2)
    assert plan_for(lambda plan, slots: 1 / slots, fixed, jobs=8).cohort_size == 4


def test_one_job_needs_one_worker(forks):
    assert plan_for(lambda plan, slots: 1 / plan.workers, jobs=1).workers == 1


def test_a_plan_is_measured_once_for_a_shape(cache):
    times = sized(s2=0.5)
    first, told = choose(AUTO, FakeProbe(times), 8, ["a", 3], lambda text: None), []
    idle = FakeProbe()
    assert choose(AUTO, idle, 8, ["a", 3], told.append) == first
    assert idle.asked == [] and "measured before" in told[0]
    saved = json.loads(next((cache / "plans").iterdir()).read_text())
    assert saved["plan"] == first.settings() and len(saved["seconds per client step"]) > 3
    assert [p.suffix for p in (cache / "plans").iterdir()] == [".json"]


@pytest.mark.parametrize(
    ("wanted", "jobs", "shape"),
    [(AUTO, 8, ["a", 4]), (AUTO, 9, ["a", 3]), (Resources(device="cpu", dtype="float32"), 8, ["a", 3])],
    ids=["shape", "jobs", "wanted"],
)
def test_another_shape_is_measured_anew(wanted, jobs, shape):
    choose(AUTO, FakeProbe(), 8, ["a", 3], lambda text: None)
    probe = FakeProbe()
    choose(wanted, probe, jobs, shape, lambda text: None)
    assert probe.asked


def test_another_machine_is_measured_anew(machine):
    choose(AUTO, FakeProbe(), 8, [], lambda text: None)
    machine.setattr(tuning, "processors", lambda: 2)
    probe = FakeProbe()
    choose(AUTO, probe, 8, [], lambda text: None)
    assert probe.asked


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b'{"plan": ', b"\xff\xfe\x00", b"[]", b"null", b'{"plan": 3}', b'{"plan": {}}',
        b'{"plan": {"colour": "red"}}', json.dumps({"plan": {**Plan().settings(), "cohort_size": "8"}}).encode(),
    ],
    ids=range(10),
)  # fmt: skip
def test_a_torn_or_foreign_cache_file_is_measured_again_and_replaced(cache, content):
    first = choose(AUTO, FakeProbe(sized(s2=0.5)), 8, [], lambda text: None)
    (path,) = (cache / "plans").iterdir()
    path.write_bytes(content)
    probe = FakeProbe(sized(s2=0.5))
    assert choose(AUTO, probe, 8, [], lambda text: None) == first and probe.asked
    assert json.loads(path.read_text())["plan"] == first.settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float32"), ("dtype", "bfloat16"), ("attention", "eager"), ("cohort_size", 3), ("workers", 2),
        ("threads", 3),
    ],
)  # fmt: skip
def test_a_fixed_setting_is_kept_whatever_the_times(name, value, forks):
    against = {"dtype": 0, "attention": 1, "cohort_size": 2, "workers": 3, "threads": 4}[name]

    def times(plan: Plan, slots: int) -> float:
        measured = (plan.dtype, plan.attention, slots, plan.workers, plan.threads)[against]
        return 10.0 if measured == value else 1.0

    plan = plan_for(times, Resources(device="cpu", **{name: value}))
    assert getattr(plan, name) == value


def test_a_plan_that_is_fixed_altogether_is_not_measured(cache):
    probe = FakeProbe()
    wanted = Resources("cpu", "bfloat16", "eager", 5, 2, 3)
    assert choose(wanted, probe, 8, [], lambda text: None) == Plan("cpu", "bfloat16", "eager", 5, 2, 3)
    assert probe.asked == [] and not (cache / "plans").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"engine\.device='cuda.*no CUDA device"):
        choose(Resources(device=device), FakeProbe(), 8, [], lambda text: None)
    assert tuning.pick_device("auto") == "cpu"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert tuning.pick_device("cuda:1") == "cuda:1" and tuning.pick_device("auto") == "cuda"
    with pytest.raises(ConfigError, match=r"engine\.device='cuda:2'.*below 2"):
        tuning.pick_device("cuda:2")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "gpu"), ("device", "cuda:first"), ("dtype", "float16"), ("attention", "flash"), ("cohort_size", 0),
        ("cohort_size", "many"), ("cohort_size", "2.5"), ("workers", -1), ("workers", "all"), ("threads", 0),
        ("theads", 2),
    ],
)  # fmt: skip
def test_unknown_values_are_refused_with_the_settings_name(name, value):
    with pytest.raises(ConfigError, match=rf"engine\.{name}={value!r} is not allowed"):
        build_settings({name: value}, "engine", Resources)


def test_numbers_and_auto_are_taken():
    wanted = build_settings({"cohort_size": 4, "workers": "auto", "device": "cuda:0"}, "engine", Resources)
    assert (wanted.cohort_size, wanted.workers) == (4, "auto")


def test_the_user_is_told_what_was_chosen():
    told: list[str] = []
    choose(AUTO, FakeProbe(sized(s2=0.5)), 2, [], told.append)
    assert told[-1].startswith("cpu, float32 base, sdpa attention, cohorts of 2, 1 worker x 1 thread (measured in")


def test_a_real_probe_steps_a_cohort_and_keeps_it_for_the_next_size():
    made = []

    def make(dtype, attention, device):
        made.append((dtype, attention, device))
        return build("bert", dtype=dtype)

    probe = Probe(make, batches("classification", [2, 3]), AdamW())
    assert all(probe.seconds(Plan(), slots, repeats=1) > 0 for slots in (1, 3))
    assert probe.seconds(Plan(dtype="bfloat16"), 2, repeats=1) > 0
    assert made == [(torch.float32, "sdpa", "cpu"), (torch.bfloat16, "sdpa", "cpu")]
    assert len(probe.built) == 1


def test_a_real_measurement_in_children_gives_a_plan_and_ends_them(machine):
    machine.setattr(tuning, "processors", lambda: 2)
    machine.setattr(tuning, "available", available)
    if not available():
        pytest.skip("needs fork")
    probe = Probe(lambda dtype, attention, device: build("bert", dtype=dtype), batches("classification", [2]), AdamW())
    plan = choose(Resources("cpu", "float32", "sdpa", threads=1), probe, 2, ["tiny"], lambda text: None)
    assert (plan.cohort_size, plan.threads) == (1, 1) and plan.workers in (1, 2)
    assert multiprocessing.active_children() == [] and probe.built == {}
