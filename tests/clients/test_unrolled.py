"""The unrolled local steps are the client's own, can be differentiated, and are undone by the search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.cohort import Cohort
from clients.inversion import DECAYS, Inverter, Search, largest
from clients.local.optimizers import SGD, AdamW
from clients.local.proximal import FedProx
from clients.local.training import LocalTraining, Work
from clients.unrolled import Entrance, Samples, Unrolled
from clients.worker import Worker
from fl.errors import ConfigError
from tests.oracles import inversion as oracle
from tests.oracles.cohorts import build, states
from tests.oracles.models import FAMILIES, token_set

ALGORITHMS = {
    "sgd": LocalTraining(steps=4, lr=0.3, batch_size=64, optimizer=SGD()),
    "prox, decay, clip": FedProx(
        steps=4, lr=0.3, batch_size=64, optimizer=SGD(weight_decay=0.02), mu=0.3, clip_norm=0.05
    ),
    "momentum": LocalTraining(steps=4, lr=0.3, batch_size=64, optimizer=SGD(momentum=0.9, nesterov=True)),
    "epochs": LocalTraining(epochs=3, lr=0.3, batch_size=64, optimizer=SGD()),
}
ADAPTER = LoRA(rank=3, alpha=5.0)
N = 12


def built(family: str, adapter=ADAPTER, **options) -> Cohort:
    """A cohort whose attention has a second derivative."""
    cohort = build(family, adapter, **options)
    cohort.model.config._attn_implementation = "eager"
    return cohort


def true_data(cohort, data) -> tuple[Samples, torch.Tensor]:
    """The samples of ``data`` as the search would have to find them, with hard labels; and their attention mask."""
    batch = data.batch(np.arange(len(data)))
    x = Entrance(cohort).hidden(batch.input_ids, batch.attention_mask)
    causal = cohort.task == "causal_lm"
    labels = F.one_hot(batch.labels[:, 1:], 61) if causal else F.one_hot(batch.labels, 3)
    return Samples(x[None], 1e3 * labels.double()[None]), batch.attention_mask[None]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "top layer"])
def test_on_the_true_data_it_is_what_the_client_sends(family, algorithm, layers):
    """Also what makes inversion exact at zero staleness: the change from the same start, by the same data."""
    local, cohort = ALGORITHMS[algorithm], built(family, LoRA(rank=3, alpha=5.0, layers=layers))
    # The target tokens of samples of unlike length have unlike weights, which made-up samples have not.
    data = token_set(cohort.task, N, 0, *((3, 9) if cohort.task == "classification" else (6, 6)))
    start = states(cohort, 1)
    work = Work(0, 1, start[0].float().numpy(), local.batches(0, 0, 1, np.arange(N)), local.lr)
    sent = Worker(cohort, {"train": data}, local, seed=0).fit([work])[0].state - work.start
    samples, mask = true_data(cohort, data)
    assert samples.x.dtype == torch.float64
    change = Unrolled(cohort, local).change(start.float().double(), samples, mask=mask)[0]
    assert np.abs(sent).max() > 1e-3
    np.testing.assert_allclose(change.detach().numpy(), sent, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_torch_s_own_sgd_on_a_network_of_another_kind(momentum):
    x, labels = oracle.owned_class(3)[0]
    start = oracle.initial(3)
    local = LocalTraining(steps=5, lr=0.05, optimizer=SGD(momentum=momentum))
    samples = Samples(x[None, :, None], 1e3 * F.one_hot(labels, 10).double()[None])
    change = Unrolled(oracle.TanhMLP(), local).change(start[None], samples)[0].detach()
    torch.testing.assert_close(change, oracle.trained(start, x, labels, 5, 0.05, momentum), rtol=0, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["sgd", "prox, decay, clip", "momentum"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_derivatives_in_samples_and_labels_are_those_of_finite_differences(family, algorithm):
    cohort = built(family)
    unrolled, inverter = (
        Unrolled(cohort, ALGORITHMS[algorithm]),
        Inverter(cohort, ALGORITHMS[algorithm], Search(), 2, 3, seed=0),
    )
    first = inverter.first(0)
    samples = [torch.tensor(a, dtype=torch.float64)[None] for a in (first.x, first.y)]
    start, weights = states(cohort, 1), torch.randn(cohort.layout.size, generator=torch.Generator().manual_seed(0))

    def value(x, y):
        return (unrolled.change(start, Samples(x, y)) @ weights.double()).sum()

    leaves = [s.clone().requires_grad_() for s in samples]
    slopes = torch.autograd.grad(value(*leaves), leaves)
    for at in range(2):
        along = torch.randn(samples[at].shape, generator=torch.Generator().manual_seed(at), dtype=torch.float64)
        moved = [[s + sign * 1e-5 * along if i == at else s for i, s in enumerate(samples)] for sign in (1, -1)]
        numeric = (value(*moved[0]) - value(*moved[1])) / 2e-5
        assert abs(float(numeric)) > 1e-4
        # Llama's attention has a softmax in float32.
        torch.testing.assert_close((slopes[at] * along).sum(), numeric.detach(), rtol=2e-4, atol=1e-8)


def test_slots_do_not_touch_and_only_what_trains_moves():
    cohort, local = built("bert"), ALGORITHMS["prox, decay, clip"]
    inverter, start = Inverter(cohort, local, Search(iterations=5), 4, 5, seed=0), states(cohort, 3).float().numpy()
    first, columns = [inverter.first(c) for c in range(3)], np.arange(10, cohort.layout.size, 3)
    deltas = inverter.changes(start, [inverter.first(c + 9) for c in range(3)], columns)
    found, distances = inverter.invert(start, deltas, first, columns)
    again = inverter.changes(start, found, columns)
    for s in range(3):
        alone, distance = inverter.invert(start[s : s + 1], deltas[s : s + 1], first[s : s + 1], columns)
        np.testing.assert_allclose(alone[0].x, found[s].x, atol=1e-9)
        np.testing.assert_allclose(alone[0].y, found[s].y, atol=1e-9)
        gap = np.abs(again[s] - deltas[s]).sum() / np.abs(deltas[s]).sum()
        assert distances[s] == pytest.approx(distance[0]) and distances[s] == pytest.approx(gap)
        still = inverter.unrolled.change(
            torch.tensor(start[s : s + 1]).double(), samples(alone), inverter._trained(columns)
        )
        assert set(still[0].nonzero()[:, 0].tolist()) <= set(columns.tolist())


def samples(estimates) -> Samples:
    return Samples(*(torch.tensor(np.stack([getattr(e, n) for e in estimates])).double() for n in ("x", "y")))


@pytest.mark.parametrize("seed", range(3))
def test_the_search_brings_the_distance_down_by_five_from_a_random_start(seed):
    x, labels = oracle.owned_class(seed)[0]
    start = oracle.initial(seed)[None]
    unrolled = Unrolled(oracle.TanhMLP(), LocalTraining(steps=5, lr=0.05, optimizer=SGD()))
    target = unrolled.change(start, Samples(x[None, :, None], 1e3 * F.one_hot(labels, 10).double()[None])).detach()
    first, bounds = oracle.first_samples(seed), torch.full((20,), 3.0, dtype=torch.float64)
    before = (unrolled.change(start, first) - target).abs().sum() / target.abs().sum()
    found, distance = Search(iterations=150).run(unrolled, start, target, first, -bounds, bounds)
    assert float(distance) < float(before) / 5
    assert float(found.x.abs().max()) <= 3.0 + 1e-12
    _, warm = Search(iterations=40).run(unrolled, start, target, found, -bounds, bounds)
    _, cold = Search(iterations=40).run(unrolled, start, target, first, -bounds, bounds)
    assert float(warm) <= float(distance) + 1e-9 < float(cold)


@pytest.mark.parametrize("seed", range(3))
def test_estimates_lose_to_the_stale_update_when_it_is_young_and_win_when_it_is_old(seed):
    """Nine clients move the server while the tenth, which alone has class 5, is at work; the search is a short one."""
    data, start = oracle.owned_class(seed), oracle.initial(seed)
    past = oracle.history(start, data, 55, 5, 0.05)
    stale = oracle.trained(past[5], *data[-1], 5, 0.05)
    unrolled = Unrolled(oracle.TanhMLP(), LocalTraining(steps=5, lr=0.05, optimizer=SGD()))
    bounds = torch.full((20,), 3.0, dtype=torch.float64)
    found, _ = Search(iterations=60).run(
        unrolled, past[5][None], stale[None], oracle.first_samples(seed), -bounds, bounds
    )
    errors = {}
    for staleness in (1, 50):
        now = past[5 + staleness]
        true, made = oracle.trained(now, *data[-1], 5, 0.05), unrolled.change(now[None], found)[0].detach()
        errors[staleness] = float((made - true).abs().sum()), float((stale - true).abs().sum())
    assert errors[1][0] > 1.1 * errors[1][1]
    assert errors[50][0] < errors[50][1] / 1.1


def test_the_sought_step_falls_at_the_published_places():
    rates = list(Search(iterations=16, lr=0.5)._rates())
    assert DECAYS == (3 / 8, 5 / 8, 7 / 8)
    np.testing.assert_allclose(rates, [0.5] * 6 + [0.05] * 4 + [0.005] * 4 + [0.0005] * 2)


def test_sparsified_matching_looks_at_the_largest_coordinates_of_each_update():
    target = torch.tensor([[0.0, -5, 1, 2, -3, 0], [9.0, 0, 0, -1, 8, 7]])
    assert largest(target, 0.5, 6).int().tolist() == [[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1]]
    assert largest(target, 0.5, 4).int().tolist() == [[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0]]
    assert largest(target, 1.0, 6).all()
    start, first = oracle.initial(0)[None], oracle.first_samples(0)
    unrolled = Unrolled(oracle.TanhMLP(), LocalTraining(steps=2, lr=0.05, optimizer=SGD()))
    target = unrolled.change(start, oracle.first_samples(1)).detach()
    bounds = torch.full((20,), 3.0, dtype=torch.float64)
    kept = largest(target, 0.1, target.shape[1])
    found, distance = Search(iterations=40, matched=0.1).run(unrolled, start, target, first, -bounds, bounds)
    gap = (unrolled.change(start, found) - target).abs() * kept
    torch.testing.assert_close(distance, (gap.sum(1) / (target.abs() * kept).sum(1)).detach())
    _, whole = Search(iterations=40).run(unrolled, start, target, first, -bounds, bounds)
    assert float(distance) < float(whole)


def test_an_estimate_begins_as_hidden_states_of_tokens_from_its_own_key():
    inverter = Inverter(built("llama"), ALGORITHMS["sgd"], Search(), 5, 4, seed=3)
    first = inverter.first(1)
    assert first.x.shape == (5, 4, 24) and first.y.shape == (5, 3, 61)
    assert inverter.unknowns == 5 * 4 * 24 + 5 * 3 * 61
    table = inverter.cohort.model.get_input_embeddings().weight.detach().numpy()
    for row in first.x.reshape(-1, 24):
        assert np.abs(table - row).sum(1).min() == 0
    assert (inverter.low.numpy() < inverter.high.numpy()).all()
    same = Inverter(built("llama"), ALGORITHMS["sgd"], Search(), 5, 4, seed=3).first(1)
    assert np.array_equal(same.x, first.x) and np.array_equal(same.y, first.y)
    assert not np.array_equal(inverter.first(2).x, first.x)


def test_the_layers_below_the_first_adapted_one_do_not_run_on_made_up_samples():
    cohort = built("bert", LoRA(rank=3, layers=[2]), layers=3)
    inverter = Inverter(cohort, ALGORITHMS["sgd"], Search(), 2, 4, seed=0)
    ran: list[int] = []
    layers = next(m for m in cohort.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    for i, layer in enumerate(layers):
        layer.attention.register_forward_hook(lambda *_, i=i: ran.append(i))
    estimate = inverter.first(0)
    ran.clear()
    inverter.changes([cohort.initial.numpy()], [estimate])
    assert ran == [2] * 4


def test_what_is_adapted_below_the_layers_is_refused():
    cohort = built("gpt2", Peft(method="lora", rank=2, target_modules=["wte", "c_attn"]))
    with pytest.raises(ConfigError, match=r"adapter.target_modules=.*modules of the model's layers"):
        Entrance(cohort)


def test_an_optimiser_that_overwrites_what_its_gradient_needs_is_not_differentiated_in_silence():
    cohort = built("bert")
    local = LocalTraining(steps=2, lr=0.1, optimizer=AdamW())
    first = Inverter(cohort, ALGORITHMS["sgd"], Search(), 2, 4, seed=0).first(0)
    x, y = (torch.tensor(a)[None].double().requires_grad_() for a in (first.x, first.y))
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(Unrolled(cohort, local).change(states(cohort, 1), Samples(x, y)).sum(), [x, y])
