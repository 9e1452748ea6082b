from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from clients.models import load_for_adapter
from fl.errors import ConfigError, RunStopped
from fl.experiment import Experiment, Settings
from fl.messages import MalformedMessage, PeerRequest
from fl.run import resume
from fl.schedules.dadao import DADAO, HeadPart
from tests.helpers import DECODER, ENCODER, SHARED, evaluations, final, go, metrics, rounds, vector
from tests.test_resume import killed_at, moments, same_end

PLAIN = (
    "adapter=head",
    "schedule=dadao",
    "topology=ring",
    "schedule.rounds=4",
    "schedule.round_s=5",
    "schedule.l2=0.1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dadao") / "run"
    go(folder, *PLAIN)
    return folder


@pytest.fixture(scope="module")
def part(run):
    from fl.compose import compose

    experiment = Experiment(Settings.of(compose([*ENCODER, *PLAIN])[0]), SHARED)
    made = HeadPart(experiment, 0.1)
    yield made, experiment
    experiment.close()


def ask(experiment, client: int, **arrays: np.ndarray) -> PeerRequest:
    layout = experiment.trainer.worker.cohort.layout.hash
    return PeerRequest(client, 1, 0, np.zeros(0, np.float32), layout, {}, arrays)


# The nodes' half


def test_a_gradient_is_that_of_the_network_itself(part):
    """The loss of all of a peer's samples through the whole model, by autograd, against the features' closed form."""
    made, experiment = part
    worker, examples = experiment.trainer.worker, experiment.data.parts[1]
    size = worker.cohort.layout.size
    point = np.random.default_rng(0).normal(size=size) * 0.3
    (reply,) = made.answer([ask(experiment, 1, point=point)])
    losses, grads = worker.gradients(point.astype(np.float32), [examples], [None])
    assert reply.arrays["loss"][0] == pytest.approx(losses[0] + 0.05 * point @ point, rel=1e-5)
    assert np.abs(reply.arrays["gradient"] - (grads[0] + 0.1 * point)).max() < 1e-5


def test_the_bound_holds_between_any_two_points(part):
    made, experiment = part
    size = experiment.trainer.worker.cohort.layout.size
    (reply,) = made.answer([ask(experiment, 0)])
    bound, draws = reply.arrays["smoothness"][0], np.random.default_rng(1)
    for _ in range(5):
        one, other = draws.normal(size=(2, size))
        slopes = [made.answer([ask(experiment, 0, point=p)])[0].arrays["gradient"] for p in (one, other)]
        ratio = (slopes[0] - slopes[1]) @ (one - other) / ((one - other) @ (one - other))
        assert 0.1 - 1e-12 <= ratio <= bound


@pytest.mark.parametrize("point", [np.zeros(3), np.zeros(0), np.zeros(130, np.float32)])
def test_a_point_of_another_shape_is_refused(part, point):
    made, experiment = part
    (reply,) = made.answer([ask(experiment, 0, point=point)])
    assert isinstance(reply, MalformedMessage)


# The schedule


def test_the_objective_falls_and_the_model_is_the_mean(run):
    found = rounds(run)
    losses = [e["loss"] for e in found]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert found[-1]["gradient_norm"] < found[0]["gradient_norm"]
    assert [e["virtual_s"] for e in found] == [5.0, 10.0, 15.0, 20.0]
    assert all(np.isfinite(e["consensus"]) for e in found)


def test_it_comes_to_the_optimum_of_the_pooled_objective(tmp_path):
    """Where the mean of the peers' gradients is zero, which is strongly convex's only such point."""
    go(tmp_path / "run", *PLAIN, "schedule.round_s=90", "schedule.rounds=2", "schedule.l2=3")
    last = rounds(tmp_path / "run")[-1]
    assert last["gradient_norm"] < 1e-6
    assert last["consensus"] < 1e-5


def test_bytes_are_those_of_the_vectors_that_were_exchanged(run):
    found = rounds(run)
    total = sum(e["bytes_links"] for e in found)
    links = next(e for e in metrics(run) if e["event"] == "links")["links"]
    assert sum(size for _, _, size in links) == total
    assert {(a, b) for a, b, _ in links} == {(i, j) for i in range(4) for j in range(4) if (i - j) % 4 in (1, 3)}
    each, rest = divmod(total, 2 * found[-1]["communications"])
    assert rest == 0 and 0 < each - 8 * len(vector(run)) < 300


def test_more_communication_than_needed_is_counted(tmp_path, run):
    go(tmp_path / "run", *PLAIN, "schedule.rate_factor=3")
    more, plain = rounds(tmp_path / "run")[-1], rounds(run)[-1]
    assert more["gradients"] == plain["gradients"]
    assert 2 < more["communications"] / plain["communications"] < 4


def test_a_given_smoothness_is_used(tmp_path, run):
    go(tmp_path / "run", *PLAIN, "schedule.smoothness=50")
    assert rounds(tmp_path / "run")[-1]["loss"] > rounds(run)[-1]["loss"]  # smaller steps


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_run_that_is_killed_goes_on_to_the_same_end(tmp_path, share):
    total = moments(tmp_path / "whole", *PLAIN)
    killed_at(int(total * share), tmp_path / "cut", *PLAIN)
    resume(tmp_path / "cut", shared=SHARED, quiet=True)
    same_end(tmp_path / "cut", tmp_path / "whole")


def test_a_peer_without_an_answer_stops_the_run(tmp_path, monkeypatch):
    answer = HeadPart._one

    def broken(self, request):
        return MalformedMessage("schema", "broken") if request.client == 2 else answer(self, request)

    monkeypatch.setattr(HeadPart, "_one", broken)
    with pytest.raises(RunStopped, match="Peer 2"):
        go(tmp_path / "run", *PLAIN)


@pytest.mark.parametrize(
    ("more", "key", "text"),
    [
        (("adapter=lora",), "adapter", "a2cid2"),
        (("network=lognormal",), "network", "instant"),
        (("topology.latency_s=0.1",), "topology.latency_s", "null"),
        (("topology=one_peer_exponential",), "topology", "undirected"),
        (("schedule.smoothness=0.01",), "schedule.smoothness", "strong convexity"),
        (("attack=faulty",), "attack", "none"),
    ],
)
def test_what_it_has_no_place_for_is_refused(tmp_path, more, key, text):
    with pytest.raises(ConfigError, match=text) as error:
        go(tmp_path / "run", *PLAIN, *more)
    assert error.value.key == key


# The adapter


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_the_head_alone_trains_under_a_server_and_reloads(tmp_path, form):
    folder = tmp_path / "run"
    go(folder, "adapter=head", "local=sgd", "local.lr=0.5", f"saving.form={form}")
    scores = evaluations(folder)
    assert scores[-1]["loss"] < scores[0]["loss"]
    saved, probe = folder / "adapter", load_file(folder / "adapter" / "probe.safetensors")
    if form == "adapter":
        tensors = load_file(saved / "adapter_model.safetensors")
        assert sorted(t.dim() for t in tensors.values()) == [1, 2]
        assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"]
        model = PeftModel.from_pretrained(load_for_adapter(saved), saved).eval()
    else:
        from clients.models.saved import load_merged

        model = load_merged(saved)
    with torch.no_grad():
        logits = model(input_ids=probe["input_ids"], attention_mask=probe["attention_mask"]).logits
    assert (logits - probe["logits"]).abs().max() < 1e-6
    assert final(folder)["rounds"] == 2


def test_a_language_model_has_no_head_of_its_own(tmp_path):
    with pytest.raises(ConfigError, match="classifiers"):
        go(tmp_path / "run", "adapter=head", base=DECODER)


@pytest.mark.parametrize("more", ["adapter.train_head=false", "adapter.target_modules=[query]"])
def test_the_head_alone_means_just_that(tmp_path, more):
    with pytest.raises(ConfigError, match="adapter"):
        go(tmp_path / "run", "adapter=head", more)


def test_rounds_are_at_least_a_microsecond():
    with pytest.raises(ConfigError, match="microsecond"):
        DADAO(round_s=1e-8)
