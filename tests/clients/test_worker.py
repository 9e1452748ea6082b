"""One worker: what it trains on, which dropout keys it gives, and what it scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clients.adapters.lora import LoRA
from clients.cohort import CohortBatch
from clients.local.training import LocalTraining, Work
from clients.worker import Worker
from tests.oracles.cohorts import build, states
from tests.oracles.models import token_set

TASKS = {"bert": "classification", "llama": "causal_lm"}


def worker(family: str, local: LocalTraining | None = None, **model) -> Worker:
    cohort = build(family, LoRA(rank=3), torch.float32, **model)
    sets = {name: token_set(TASKS[family], 20, seed) for seed, name in enumerate(("train", "test"))}
    return Worker(cohort, sets, local or LocalTraining(steps=2, batch_size=4), seed=5)


def jobs(of: Worker, steps: tuple[int, ...] = (2, 1)) -> list[Work]:
    rng = np.random.default_rng(1)
    start = of.cohort.initial.numpy()
    return [Work(c, 3, start, [rng.choice(20, 4) for _ in range(n)], 0.01) for c, n in enumerate(steps)]


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("name", ["train", "test"])
def test_scores_are_those_of_the_plain_model_one_sample_at_a_time(family, name):
    mine = worker(family)
    data, state, examples = mine.sets[name], states(mine.cohort, 1)[0], np.array([7, 2, 11])
    scores = mine.evaluate(state.numpy(), name, examples)
    plain = mine.cohort.unstacked(state)
    for place, example in enumerate(examples):
        batch = data.batch(np.array([example]))
        with torch.no_grad():
            logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[0]
        if family == "bert":
            loss, targets, predicted = F.cross_entropy(logits, batch.labels[0]), 1, int(logits.argmax())
        else:
            loss = F.cross_entropy(logits[:-1], batch.labels[0, 1:], reduction="sum")
            targets, predicted = len(logits) - 1, -1
        assert scores.loss[place] == pytest.approx(loss.item(), rel=1e-5)
        assert (scores.targets[place], scores.predicted[place]) == (targets, predicted)
    assert scores.loss.dtype == np.float64


def test_prompt_tokens_carry_no_loss_and_are_no_targets():
    mine = worker("llama")
    data = mine.sets["test"]
    free = mine.evaluate(mine.cohort.initial.numpy(), "test", np.arange(4))
    data.prompt_lengths = np.where(np.arange(20) == 1, 2, 0)
    held = mine.evaluate(mine.cohort.initial.numpy(), "test", np.arange(4))
    # The first token is never a target, so a prompt of two takes one away.
    assert (free.targets - held.targets).tolist() == [0, 1, 0, 0]
    assert held.loss[1] < free.loss[1] and np.array_equal(np.delete(held.loss, 1), np.delete(free.loss, 1))


def test_evaluation_has_no_dropout_and_training_has():
    mine, calm = worker("bert", dropout=0.4), worker("bert")
    state, examples = states(mine.cohort, 1)[0].numpy(), np.arange(6)
    assert np.array_equal(mine.evaluate(state, "test", examples).loss, calm.evaluate(state, "test", examples).loss)
    dropped, plain = mine.fit(jobs(mine)), calm.fit(jobs(calm))
    assert all(not np.allclose(a.state, b.state, atol=1e-6) for a, b in zip(dropped, plain, strict=True))


def test_dropout_is_keyed_by_seed_client_round_and_step(monkeypatch):
    mine, seen = worker("bert", dropout=0.4), []
    gradients = mine.cohort.gradients
    monkeypatch.setattr(mine.cohort, "gradients", lambda s, b, a: (seen.append(b.keys), gradients(s, b, a))[1])
    mine.fit(jobs(mine))
    assert seen == [[(5, 0, 3, 0), (5, 1, 3, 0)], [(5, 0, 3, 1)]]


def test_training_goes_through_the_examples_of_each_step_in_order(monkeypatch):
    mine, seen, works = worker("llama"), [], jobs(worker("llama"))
    gradients = mine.cohort.gradients
    monkeypatch.setattr(mine.cohort, "gradients", lambda s, b, a: (seen.append(b), gradients(s, b, a))[1])
    mine.fit(works)
    for step, batch in enumerate(seen):
        expected = CohortBatch.of([mine.sets["train"].batch(w.batches[step]) for w in works if len(w.batches) > step])
        assert torch.equal(batch.input_ids, expected.input_ids) and torch.equal(batch.labels, expected.labels)
        assert batch.keys is None


def test_padding_is_the_sets_own_token():
    mine = worker("llama")
    mine.sets["train"].pad_id = 9
    batch = mine._batch("train", [np.arange(3), np.arange(1)], None)
    assert (batch.input_ids[batch.attention_mask == 0] == 9).all()
