"""The numbers of an evaluation, by hand: from logits of the model in a plain forward pass, example by example."""

import math

import numpy as np
import pytest
import torch

from clients.worker import Scores
from fl.compose import compose
from fl.evaluation import Evaluation, numbers
from fl.experiment import Experiment, Settings
from tests.helpers import DECODER, ENCODER, SHARED, evaluations, go

DUE = [
    (Evaluation(every=1), [0, 1, 2, 3, 4, 5], [5]),
    (Evaluation(every=2), [0, 2, 4, 5], [5]),
    (Evaluation(every=0), [0, 5], [5]),
    (Evaluation(every=9), [0, 5], [5]),
    (Evaluation(every=2, clients="always"), [0, 2, 4, 5], [0, 2, 4, 5]),
    (Evaluation(every=1, clients="never"), [0, 1, 2, 3, 4, 5], []),
]


@pytest.mark.parametrize(("when", "central", "clients"), DUE)
def test_when_it_is_due(when, central, clients):
    assert [r for r in range(6) if when.central(r, last=r == 5)] == central
    assert [r for r in range(6) if when.per_client(when.central(r, r == 5), last=r == 5)] == clients


def test_it_is_due_where_virtual_time_passes_a_multiple():
    when = Evaluation(every=0, every_s=2.0)
    last, found = 0, []
    for round, tick in enumerate((0, 1_999_999, 2_000_000, 3_500_000, 4_100_000, 9_000_000, 9_900_000)):
        if when.central(round, False, last, tick):
            found.append(tick)
            last = tick
    assert found == [0, 2_000_000, 4_100_000, 9_000_000]


def test_scores_become_numbers():
    scores = Scores(np.array([0.5, 1.5, 1.0]), np.array([1, 1, 1]), np.array([2, 0, 1]))
    found = numbers(scores, np.array([2, 1, 1]))
    assert found == {"loss": 1.0, "accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx((1 + 2 / 3 + 0) / 3)}


def test_perplexity_is_a_mean_over_tokens_not_over_samples():
    scores = Scores(np.array([8.0, 1.0]), np.array([4, 1]), np.array([-1, -1]))
    assert numbers(scores, None) == {"loss": 9 / 5, "perplexity": pytest.approx(math.exp(9 / 5))}
    nothing = Scores(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert numbers(nothing, None) == {"loss": None, "perplexity": None}


def plain_model(folder):
    """The adapter of a finished run in plain PEFT over its base."""
    from peft import PeftModel

    from clients.models import load_for_adapter

    return PeftModel.from_pretrained(load_for_adapter(folder / "adapter"), folder / "adapter").eval()


def experiment_of(words) -> Experiment:
    return Experiment(Settings.of(compose(words)[0]), SHARED)


def by_hand(model, data, examples, task) -> list[tuple[float, int, bool]]:
    """(summed loss, targets, right) of each example by itself, unpadded, from a plain forward pass."""
    out = []
    for i in examples:
        batch = data.batch(np.array([i]))
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
        if task == "classification":
            label = int(data.labels[i])
            loss = -torch.log_softmax(logits[0], -1)[label].item()
            out.append((loss, 1, int(logits[0].argmax()) == label))
        else:
            ids, total = batch.input_ids[0], 0.0
            for t in range(len(ids) - 1):
                total -= torch.log_softmax(logits[0, t], -1)[ids[t + 1]].item()
            out.append((total, len(ids) - 1, False))
    return out


def test_classification_numbers_are_those_of_the_saved_model(tmp_path):
    words = [*ENCODER, "partition=dirichlet", "clients.number=7", "data.client_test_fraction=0.3", "local.lr=0.02"]
    folder = tmp_path / "run"
    go(folder, *words[len(ENCODER) :])
    data, model = experiment_of(words).data, plain_model(folder)
    rows = by_hand(model, data.test, range(len(data.test)), "classification")
    event = evaluations(folder)[-1]
    assert (event["round"], event["examples"]) == (2, len(data.test))
    assert event["loss"] == pytest.approx(np.mean([r[0] for r in rows]), rel=1e-5)
    assert event["accuracy"] == np.mean([r[2] for r in rows])
    (event,) = evaluations(folder, "clients")
    own = [by_hand(model, data.train, part, "classification") for part in data.client_tests]
    accuracy = [float(np.mean([r[2] for r in rows])) for rows in own]
    assert event["metric"] == "accuracy"
    assert event["per_client"] == pytest.approx(accuracy)
    assert (event["mean"], event["std"]) == pytest.approx((np.mean(accuracy), np.std(accuracy)))
    assert event["worst_decile"] == min(accuracy)  # of seven: the worst one
    assert event["loss_mean"] == pytest.approx(np.mean([np.mean([r[0] for r in rows]) for rows in own]), rel=1e-5)
    assert len(set(accuracy)) > 2


def test_perplexity_numbers_are_those_of_the_saved_model(tmp_path):
    words = [*DECODER, "partition=natural", "clients.number=null", "local.lr=0.02"]
    folder = tmp_path / "run"
    go(folder, *words[len(DECODER) :], base=DECODER)
    data, model = experiment_of(words).data, plain_model(folder)
    rows = by_hand(model, data.test, range(len(data.test)), "causal_lm")
    event = evaluations(folder)[-1]
    loss = sum(r[0] for r in rows) / sum(r[1] for r in rows)
    assert event["loss"] == pytest.approx(loss, rel=1e-5)
    assert event["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert "accuracy" not in event
    (event,) = evaluations(folder, "clients")
    own = [by_hand(model, data.train, part, "causal_lm") for part in data.client_tests]
    expected = [math.exp(sum(r[0] for r in rows) / sum(r[1] for r in rows)) for rows in own]
    assert event["metric"] == "perplexity"
    assert event["per_client"] == pytest.approx(expected, rel=1e-5)
    assert event["worst_decile"] == pytest.approx(max(expected), rel=1e-5)  # the higher the worse
    assert len(expected) == 6


def test_clients_without_a_test_set_are_left_out(tmp_path):
    go(tmp_path / "none", "data.client_test_fraction=0", "evaluation.clients=always")
    assert evaluations(tmp_path / "none", "clients") == []


def test_it_is_written_when_it_is_due(tmp_path):
    more = ("schedule.rounds=5", "evaluation.every=2", "evaluation.clients=always")
    go(tmp_path / "run", *more)
    for split in ("test", "clients"):
        assert [e["round"] for e in evaluations(tmp_path / "run", split)] == [0, 2, 4, 5]
