"""DP-SGD in the cohort against Opacus and batches of one; sensitivity, noise, and what a job's result depends on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import clients.cohort
from clients.adapters.bra import BRA
from clients.adapters.ffa import FFA
from clients.adapters.lora import LoRA
from clients.adapters.rolora import RoLoRA
from clients.adapters.s2ft import S2FT
from clients.adapters.sora import SoRA
from clients.adapters.space import Space
from clients.cohort import Cohort, CohortBatch
from clients.data.batch import Batch
from clients.layout import Layout
from clients.local import dylora, private, training
from clients.local.dylora import DyLoRA
from clients.local.lora_pro import LoRAPro
from clients.local.optimizers import SGD, AdamW
from clients.local.private import CLIPPING, AdaptiveClip, Private, clipping_groups, gradients
from clients.local.proximal import FedProx
from clients.local.sora import SoRATraining
from clients.local.training import CLIP, LocalTraining, Work
from clients.trainer import Plan
from clients.tuning import Probe
from tests.oracles.cohorts import ADAPTERS, apart, build, states
from tests.oracles.dp_sgd import Opacus, clipped_sum, samples_alone
from tests.oracles.models import batches, token_set
from tests.oracles.variants import of_rank, spaced, trained_alone

TRAINED = {"lora": LoRA(rank=3, alpha=5.0), "ffa": FFA(rank=3), "lora_sb": BRA(rank=3)}
SPACED = {
    **TRAINED, "rolora": RoLoRA(rank=3), "sora": SoRA(rank=3), "s2ft": S2FT(rank=3),
}  # fmt: skip


def job(clip: float = 0.5, noise: float = 0.0, expected: float = 1.0, key: str = "k", **more) -> Private:
    return Private(clip, noise, expected, (key,), **more)


def works(*jobs: Private) -> list[Work]:
    return [Work(c, 1, np.zeros(1, np.float32), [np.arange(1)], 0.1, private=j) for c, j in enumerate(jobs)]


def sums(cohort: Cohort, at: Tensor, data: list[Batch], jobs: list[Private], parts: int = 1, **more) -> Tensor:
    return gradients(cohort, at, CohortBatch.of(data, **more), works(*jobs), 0, parts)[1]


def nothing(like: Batch) -> Batch:
    """What Poisson sampling may draw."""
    return Batch(like.input_ids[:0], like.attention_mask[:0], like.labels[:0])


def joined(first: Batch, second: Batch) -> Batch:
    """The samples of both, padded to the longer."""
    width = max(first.input_ids.shape[1], second.input_ids.shape[1])

    def wide(t: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(t, (0, width - t.shape[1]), value=fill) if t.dim() == 2 else t

    return Batch(
        *(torch.cat([wide(getattr(b, n), f) for b in (first, second)]) for n, f in
          (("input_ids", 0), ("attention_mask", 0), ("labels", -100)))
    )  # fmt: skip


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The slow twins


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("adapter", TRAINED)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_gradients_before_noise_are_opacus(family, adapter, clipping):
    """Two clients beside each other, and one of them without a sample; the head of BERT included."""
    cohort = spaced(family, TRAINED[adapter])
    whole, data = states(cohort, 1)[0], batches(cohort.task, [5, 3])
    groups = cohort.space.trains(1)
    with cohort.training(groups, whole):
        names = cohort.layout.names
        at = whole[torch.from_numpy(cohort.space.columns(groups).copy())] + 0.1 * normal(2, cohort.layout.size)
        jobs = [job(0.8, expected=4, clipping=clipping), job(0.3, expected=2, clipping=clipping)]
        jobs.append(job(0.8, expected=4, clipping=clipping))
        mine = sums(cohort, torch.cat([at, at[:1]]), [*data, nothing(data[0])], jobs)
        tensors = cohort.space.layout.views(whole)
    assert any("classifier" in n for n in names) == (family == "bert")
    norms = []
    for slot, batch in enumerate(data):
        mechanism = jobs[slot]
        twin = Opacus(
            family, TRAINED[adapter], tensors, names, mechanism.clip, 0.0, int(mechanism.expected),
            per_layer=clipping == "per_layer",
        )  # fmt: skip
        twin.load(at[slot])
        # Opacus divides by the norm plus 1e-6.
        assert apart(mine[slot], twin.step(batch)) <= 1e-5
        norms.append(float(mine[slot].norm()) * mechanism.expected / len(batch) / mechanism.clip)
    assert not mine[2].any()
    assert max(norms) > 0.2  # so that there was something to clip


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize(("family", "adapter"), [("bert", "dora"), ("llama", "vera"), ("bert", "ia3")])
def test_where_opacus_has_no_hook_a_loop_over_batches_of_one_agrees(family, adapter, clipping):
    cohort, clip = build(family, adapter), 0.05 if adapter == "vera" else 0.3
    at, data = states(cohort, 2), batches(cohort.task, [4, 2])
    mine = sums(cohort, at, data, [job(clip, expected=3, clipping=clipping)] * 2)
    groups = clipping_groups(cohort, clipping)
    assert (len(groups) == 1) == (clipping == "flat")
    for slot, batch in enumerate(data):
        samples = samples_alone(cohort, at[slot], batch)
        assert float(samples.norm(dim=1).max()) > clip
        assert apart(mine[slot] * 3, clipped_sum(samples, cohort.layout, clip, groups)) <= 1e-9


def test_clients_of_mixed_ranks_agree_with_models_of_just_their_ranks():
    cohort = spaced("llama", LoRA(rank=[4, 2], alpha=[8.0, 2.0]))
    at, data = states(cohort, 2), batches("causal_lm", [3, 2])
    columns = [cohort.space.columns(None, c).copy() for c in (0, 1)]
    for slot in (0, 1):  # what a client does not own is zero
        owned = torch.zeros(cohort.layout.size, dtype=torch.bool)
        owned[columns[slot]] = True
        at[slot] = torch.where(owned, at[slot], 0.0)
    with trained_alone(cohort, (0, 1)):
        mine = sums(cohort, at, data, [job(0.05), job(0.05)])
        noisy = sums(cohort, at, data, [job(0.05, noise=1.0), job(0.05, noise=1.0)]) - mine
        for slot, (rank, alpha) in enumerate([(4, 8.0), (2, 2.0)]):
            views = cohort.layout.views(at[slot])
            block = {m.name: (views[m.a][:rank], views[m.b][:, :rank]) for m in cohort.space.modules}
            total = torch.zeros(cohort.layout.size, dtype=torch.float64)
            for row in range(len(data[slot])):
                alone = Batch(
                    *(t[row : row + 1] for t in (data[slot].input_ids, data[slot].attention_mask, data[slot].labels))
                )
                _, found = of_rank("llama", ["q_proj", "v_proj"], block, alpha, alone)
                sample = torch.zeros(cohort.layout.size, dtype=torch.float64)
                for module in cohort.space.modules:
                    cohort.layout.views(sample)[module.a][:rank] = found[module.name][0]
                    cohort.layout.views(sample)[module.b][:, :rank] = found[module.name][1]
                total += sample / max(1.0, float(sample.norm()) / 0.05)
            assert apart(mine[slot], total) <= 1e-7
            own = torch.zeros(cohort.layout.size, dtype=torch.bool)
            own[columns[slot]] = True
            # Noise only where the client has something to send: elsewhere it would raise its rank.
            assert bool(noisy[slot][own].all()) and not noisy[slot][~own].any()


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_a_job_of_some_steps_is_opacus_chain_of_optimiser_steps(kind):
    """Noise off; one of the batches is empty, which is a step all the same: momentum and moments go on."""
    ours, theirs = {
        "sgd": (SGD(), lambda p: torch.optim.SGD(p, lr=0.2)),
        "momentum": (SGD(momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9)),
        # A large eps: rounding of entries near zero is not blown up.
        "adamw": (
            AdamW(eps=1e-3, weight_decay=0.1),
            lambda p: torch.optim.AdamW(p, lr=0.2, eps=1e-3, weight_decay=0.1),
        ),
    }[kind]
    cohort, local = build("bert", dtype=torch.float32), LocalTraining(steps=4, optimizer=ours)
    data, other = batches("classification", [3, 2, 4]), batches("classification", [4, 4, 4], seed=7)
    steps: list[list[Batch]] = [
        [data[0], other[0]],
        [nothing(data[0]), other[1]],
        [data[1], other[2]],
        [data[2], other[0]],
    ]
    start = states(cohort, 1)[0].float()
    todo = [
        replace(w, start=start.numpy(), batches=[np.arange(1)] * 4, lr=0.2)
        for w in works(job(0.4, 0, 3), job(0.4, 0, 3))
    ]
    fits = local.fit(cohort, todo, lambda active, step: CohortBatch.of([steps[step][s] for s in active]))
    twin = Opacus(
        "bert", ADAPTERS["lora"], cohort.layout.views(start), cohort.layout.names, 0.4, 0.0, 3, theirs,
        dtype=torch.float32,
    )  # fmt: skip
    for step in range(4):
        twin.step(None if step == 1 else steps[step][0])
    mine = torch.from_numpy(fits[0].state)
    assert apart(mine - start, twin.state() - start) <= 1e-5
    assert (mine - start).norm() > 0.01


# Noise


def within_chi_square(values: Tensor, scale: float) -> None:
    """``values`` have the variance ``scale``^2: the sum of squares within 6 of its standard deviations (2e-9)."""
    z = values.double() / scale
    assert abs(float((z**2).mean()) - 1) < 6 * math.sqrt(2 / z.numel())
    assert abs(float(z.mean())) < 6 / math.sqrt(z.numel())


@pytest.mark.parametrize("empty", [True, False])
def test_noise_has_the_scale_of_opacus(empty):
    """z C / expected batch, whatever batch was drawn; 20 steps and about 1,500 numbers each."""
    cohort = build("bert")
    at, data = states(cohort, 1), batches("classification", [5])[0]
    batch = CohortBatch.of([nothing(data) if empty else data])
    _, calm = gradients(cohort, at, batch, works(job(0.6, 0.0, 4)), 0)
    noisy = [gradients(cohort, at, batch, works(job(0.6, 1.3, 4)), s)[1] - calm for s in range(20)]
    within_chi_square(torch.cat(noisy), 1.3 * 0.6 / 4)
    views = cohort.layout.views(torch.cat(noisy))
    for name in (n for n in views if "classifier" in n or "lora_B" in n):
        within_chi_square(views[name], 1.3 * 0.6 / 4)
    twin = Opacus("bert", ADAPTERS["lora"], cohort.layout.views(at[0]), cohort.layout.names, 0.6, 1.3, 4,
                  lambda p: torch.optim.SGD(p, lr=0.0))  # fmt: skip
    theirs = [twin.step(None if empty else data) - calm[0] for _ in range(20)]
    within_chi_square(torch.stack(theirs), 1.3 * 0.6 / 4)


def test_noise_depends_on_key_and_step_alone():
    cohort = build("bert")
    at, data = states(cohort, 2), batches("classification", [4, 2])
    empty = nothing(data[0])

    def noise(step: int, jobs: list[Private], who: list[int], given: list[Batch]) -> Tensor:
        return gradients(cohort, at[who], CohortBatch.of(given), works(*jobs), step)[1]

    first = noise(0, [job(noise=1.0, key="a")], [0], [empty])
    beside = noise(0, [job(noise=1.0, key="b"), job(noise=1.0, key="a")], [1, 0], [data[0], empty])
    assert torch.equal(beside[1], first[0])
    assert torch.equal(noise(0, [job(noise=1.0, key="a")], [1], [empty]), first)
    others = [noise(1, [job(noise=1.0, key="a")], [0], [empty]), noise(0, [job(noise=1.0, key="b")], [0], [empty])]
    for other in others:
        assert abs(float(torch.corrcoef(torch.cat([first, other]))[0, 1])) < 6 / math.sqrt(cohort.layout.size)


# What a sample can do


def cohort_of(adapter: str) -> Cohort:
    if adapter == "mixed":
        return spaced("llama", LoRA(rank=[4, 2]))
    return spaced("bert", SPACED[adapter]) if adapter in SPACED else build("bert", adapter)


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("adapter", [*dict.fromkeys([*SPACED, *ADAPTERS]), "mixed"])
def test_one_sample_more_moves_the_sum_by_the_clip_norm_at_most(adapter, clipping):
    """It is the longest of all samples, so its batch becomes wider. A clip norm that cuts, and one that does not."""
    cohort = cohort_of(adapter)
    data, long = batches(cohort.task, [3, 2]), token_set(cohort.task, 1, 9, 14, 15).batch(np.arange(1))
    with cohort.training(cohort.space.trains(1), states(cohort, 1)[0], [0, 1]):
        at = 0.1 * normal(2, cohort.layout.size)
        for clip, cuts in ((1e-3, True), (1e6, False)):
            jobs = [job(clip, clipping=clipping), job(clip, clipping=clipping)]
            less = sums(cohort, at, data, jobs)
            more = sums(cohort, at, [joined(data[0], long), data[1]], jobs)
            moved = float((more[0] - less[0]).norm())
            assert moved <= clip * (1 + 1e-6)
            assert apart(more[1], less[1]) <= 1e-9  # what the other client does is not touched
            if cuts and clipping == "flat":
                assert moved > clip * (1 - 1e-6)
            assert moved > 1e-6


def test_a_sample_moves_the_sum_by_the_clip_norm_at_most_with_dropout_on():
    cohort = build("bert", LoRA(rank=3, dropout=0.3), dropout=0.2)
    at, data = states(cohort, 2), batches("classification", [4, 3])
    long, keys = token_set("classification", 1, 9, 14, 15).batch(np.arange(1)), [(1, 0, 1, 0), (1, 1, 1, 0)]
    less = sums(cohort, at, data, [job(0.01)] * 2, keys=keys)
    more = sums(cohort, at, [joined(data[0], long), data[1]], [job(0.01)] * 2, keys=keys)
    assert 0.01 * (1 - 1e-6) < float((more[0] - less[0]).norm()) <= 0.01 * (1 + 1e-6)
    assert apart(sums(cohort, at, data, [job(0.01)] * 2), less) > 1e-3  # the masks do something


@pytest.mark.parametrize("clipping", CLIPPING)
def test_each_group_is_within_its_share_and_all_within_the_clip_norm(clipping):
    cohort = spaced("bert", LoRA(rank=3))
    alone = batches("classification", [1])
    total = sums(cohort, states(cohort, 1), alone, [job(1e-5, clipping=clipping)])[0]
    groups = clipping_groups(cohort, clipping)
    number = {"flat": 1, "per_layer": len(cohort.layout.names), "per_adapter": len(cohort.space.modules) + 1}[clipping]
    assert len(groups) == number
    assert sorted(n for names in groups for n in names) == sorted(cohort.layout.names)
    for names in groups:
        share = float(total[cohort.layout.columns(names)].norm())
        assert share == pytest.approx(1e-5 / math.sqrt(number), rel=1e-6)
    assert float(total.norm()) <= 1e-5 * (1 + 1e-6)


ALGORITHMS = {
    "sgd": (LocalTraining(steps=2, optimizer=SGD()), LoRA(rank=3)),
    "momentum": (LocalTraining(steps=2, optimizer=SGD(momentum=0.9)), LoRA(rank=3)),
    "adamw": (LocalTraining(steps=2, optimizer=AdamW()), LoRA(rank=3)),
    "clip_norm": (LocalTraining(steps=2, clip_norm=0.1, optimizer=SGD()), LoRA(rank=3)),
    "fedprox": (FedProx(steps=2, mu=0.5, optimizer=SGD()), LoRA(rank=3)),
    "lora_pro": (LoRAPro(steps=2, optimizer=SGD()), LoRA(rank=3)),
    "sora": (SoRATraining(steps=2, optimizer=SGD()), SoRA(rank=3)),
    "dylora": (DyLoRA(steps=2, optimizer=SGD()), LoRA(rank=3)),
    "dylora frozen": (DyLoRA(steps=2, frozen=True, optimizer=SGD()), LoRA(rank=3)),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_local_algorithm_sees_data_through_the_private_gradient_alone(algorithm, monkeypatch):
    """With that gradient replaced by a constant, other data give the same bits; with it in place they don't."""
    local, adapter = ALGORITHMS[algorithm]
    cohort = build("bert", adapter, dtype=torch.float32)
    cohort.space = adapter.space(cohort.unstacked(cohort.initial))
    cohort.restack()
    start = (cohort.initial + 0.1 * torch.ones_like(cohort.initial)).numpy()

    def trained(seed: int) -> np.ndarray:
        data = batches("classification", [3, 2], seed=seed)
        examples = [np.arange(3) + seed, np.arange(2) + seed]
        todo = [replace(w, start=start, batches=examples) for w in works(job(0.5, 1.0, 3))]
        with cohort.training(cohort.space.trains(1), cohort.initial, [0]):
            return local.fit(cohort, todo, lambda active, step: CohortBatch.of([data[step]]))[0].state

    assert np.abs(trained(0) - trained(1)).max() > 1e-6
    fixed = normal(1, cohort.layout.size).float()

    def refuse(*_: object) -> None:
        raise AssertionError("a gradient that is not private")

    monkeypatch.setattr(Cohort, "gradients", refuse)
    for module in (training, dylora):
        monkeypatch.setattr(module.private, "gradients", lambda *_: (torch.zeros(1), fixed.clone()))
    assert np.array_equal(trained(0), trained(1))


@pytest.mark.parametrize("parts", [2, 3, 9])
@pytest.mark.parametrize("piece", [0, 512])
def test_parts_pieces_neighbours_and_order_change_nothing(parts, piece, monkeypatch):
    monkeypatch.setattr(clients.cohort, "PIECE_TOKENS", piece)
    cohort = build("bert", LoRA(rank=3, dropout=0.3), dropout=0.2)
    at, data = states(cohort, 3), batches("classification", [4, 1, 3])
    keys = [(1, s, 1, 0) for s in range(3)]
    jobs = [job(0.2, 1.0, 3, key=f"{s}") for s in range(3)]
    whole = sums(cohort, at, data, jobs, keys=keys)
    assert apart(sums(cohort, at, data, jobs, parts, keys=keys), whole) <= 1e-10
    backwards = sums(cohort, at.flip(0), data[::-1], jobs[::-1], keys=keys[::-1])
    assert apart(backwards.flip(0), whole) <= 1e-10
    for slot in range(3):
        alone = sums(cohort, at[slot : slot + 1], [data[slot]], [jobs[slot]], keys=[keys[slot]])
        assert apart(alone[0], whole[slot]) <= 1e-10


def test_pieces_hold_every_sample_once_no_wider_than_the_longest_of_like_length(monkeypatch):
    monkeypatch.setattr(clients.cohort, "PIECE_TOKENS", 0)
    batch = CohortBatch.of(batches("causal_lm", [4, 1, 3]))
    pieces = list(batch.samples(most=3))
    seen = sorted((s, j) for slots, places, _ in pieces for s, j in zip(slots.tolist(), places.tolist(), strict=True))
    assert seen == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (2, 1), (2, 2)]
    for slots, places, piece in pieces:
        lengths = piece.attention_mask.sum(-1)[:, 0]
        assert len(slots) <= 3 and piece.input_ids.shape == (len(slots), 1, int(lengths.max()))
        assert float(lengths.min()) >= clients.cohort.LIKE * float(lengths.max())
        assert torch.equal(piece.attention_mask[:, 0].sum(-1), batch.attention_mask[slots, places].sum(-1))
    monkeypatch.setattr(clients.cohort, "PIECE_TOKENS", 1 << 20)
    batch.keys, batch.offsets = [("a",), ("b",), ("c",)], [0, 5, 2]
    ((slots, places, piece),) = batch.samples(most=100)
    assert piece.keys == [batch.keys[s] for s in slots.tolist()]  # a sample keeps the place that names its masks
    assert piece.offsets == [[0, 5, 2][s] + j for s, j in zip(slots.tolist(), places.tolist(), strict=True)]


def test_accumulation_bounds_the_samples_of_a_pass(monkeypatch):
    cohort = build("bert")
    seen = []
    inner = Cohort.sample_losses
    monkeypatch.setattr(Cohort, "sample_losses", lambda c, t, b: seen.append(len(b.counts)) or inner(c, t, b))
    sums(cohort, states(cohort, 2), batches("classification", [4, 4]), [job(), job()], parts=4)
    assert seen == [2, 2, 2, 2]


def test_private_and_other_jobs_do_not_mix():
    cohort = build("bert")
    batch, both = CohortBatch.of(batches("classification", [2, 2])), works(job(), job(clipping="per_layer"))
    with pytest.raises(ValueError, match="all private, in the same way"):
        gradients(cohort, states(cohort, 2), batch, both, 0)
    both[1].private = None
    with pytest.raises(ValueError, match="all private, in the same way"):
        gradients(cohort, states(cohort, 2), batch, both, 0)


# Gradients of known norms


class Given:
    """A cohort whose samples have the gradients ``(n, d)`` that are given, all of one slot each."""

    def __init__(self, grads: list[Tensor]):
        self.layout = Layout(("w",), ((grads[0].shape[1],),))
        self.space, self.grads = Space(self.layout), grads

    def each_sample(self, params: Tensor, batch: CohortBatch, parts: int):
        for slot, grads in enumerate(self.grads):
            yield (
                torch.full((len(grads),), slot), torch.arange(len(grads)), torch.zeros(len(grads)), {"w": grads}
            )  # fmt: skip


def given(grads: list[Tensor], *jobs: Private, step: int = 0) -> Tensor:
    batch = CohortBatch(*(torch.zeros(0),) * 4, counts=[len(g) for g in grads])
    params = torch.zeros(len(grads), grads[0].shape[1], dtype=grads[0].dtype)
    return gradients(Given(grads), params, batch, works(*jobs), step)[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_a_gradient_that_is_not_finite_counts_for_nothing(value):
    """Nor one whose norm is beyond float32. Other samples and other clients keep their bits."""
    good, other = torch.tensor([[3.0, 4.0], [0.1, 0.0]]), torch.tensor([[0.0, 0.2]])
    bad = torch.cat([good, torch.tensor([[value, 1e38]])])
    expected = given([good, other], job(1.0), job(1.0))
    assert torch.equal(given([bad, other], job(1.0), job(1.0)), expected)
    torch.testing.assert_close(expected[0], torch.tensor([0.7, 0.8]))


def test_a_gradient_of_zero_and_one_within_the_clip_norm_stay_as_they_are():
    grads = torch.tensor([[0.0, 0.0], [0.3, 0.4]], dtype=torch.float64)
    for clip in (0.5, 0.8, 100.0):
        assert torch.equal(given([grads], job(clip, expected=2)), torch.tensor([[0.15, 0.2]], dtype=torch.float64))


def followed(start: float, quantile: float, steps: int = 300, noise: float = 5.0) -> float:
    """The clip norm after some steps on samples whose norms are uniform in [0.5, 1.5]; Poisson batches of about 100."""
    rng = np.random.default_rng(0)
    mechanism = job(start, 0.0, 100, adaptive=AdaptiveClip(quantile, 0.2, noise))
    for step in range(steps):
        norms = torch.from_numpy(rng.uniform(0.5, 1.5, rng.binomial(1000, 0.1)))
        given([norms[:, None] * torch.tensor([[0.6, 0.8]], dtype=torch.float64)], mechanism, step=step)
    return mechanism.clip


@pytest.mark.parametrize("start", [0.1, 5.0])
def test_the_adaptive_clip_norm_comes_to_the_quantile_from_either_side(start):
    assert 0.97 < followed(start, 0.5, noise=0.5) < 1.03
    assert 1.27 < followed(start, 0.8, noise=0.5) < 1.33
    assert 0.9 < followed(start, 0.5) < 1.1  # with the noise of s_b = m/20


def test_one_step_of_the_adaptive_clip_norm_is_the_formula():
    """3 of 4 samples within the norm, m = 5, no noise of the count: b = (3/2 - 1/2)/5 + 1/2."""
    mechanism = job(1.0, 0.0, 5, adaptive=AdaptiveClip(0.3, 0.2, 0.0))
    given([torch.tensor([[0.1], [0.5], [1.0], [1.1]])], mechanism)
    assert mechanism.clip == pytest.approx(math.exp(-0.2 * (1 / 5 + 0.5 - 0.3)), rel=1e-12)


def test_the_noise_is_that_of_the_norm_that_clipped():
    """Not of the next one, which the count has moved far away."""
    empty = torch.zeros(0, 4000)
    fixed = given([empty], job(2.0, 1.5, 4))
    moving = job(2.0, 1.5, 4, adaptive=AdaptiveClip(0.9, 5.0, 0.5))
    assert torch.equal(given([empty], moving), fixed)
    assert abs(moving.clip / 2.0 - 1) > 0.5


def test_the_count_has_noise_of_its_own():
    """Standard deviation s_b: 400 steps, 6 standard deviations of the sample variance."""
    empty, drawn = torch.zeros(0, 1), []
    for step in range(400):
        mechanism = job(1.0, 0.0, 10, adaptive=AdaptiveClip(0.5, 1.0, 0.7))
        given([empty], mechanism, step=step)
        drawn.append(-math.log(mechanism.clip) * 10)
    within_chi_square(torch.tensor(drawn), 0.7)


def test_a_job_hands_its_adapted_norm_on():
    cohort = build("bert", dtype=torch.float32)
    data = batches("classification", [3])
    mechanism = job(0.01, 0.0, 3, adaptive=AdaptiveClip(0.5, 0.2, 0.1))
    todo = [replace(w, start=cohort.initial.numpy(), batches=[np.arange(1)] * 3) for w in works(mechanism)]
    fit = LocalTraining(steps=3, optimizer=SGD()).fit(cohort, todo, lambda active, step: CohortBatch.of(data))[0]
    assert fit.memory[CLIP].item() == mechanism.clip > 0.011
    todo[0].private = job(0.01)
    plain = LocalTraining(steps=3, optimizer=SGD()).fit(cohort, todo, lambda active, step: CohortBatch.of(data))[0]
    assert plain.memory == {}


def test_the_private_gradient_of_a_job_without_privacy_is_the_cohorts_own():
    cohort = build("bert")
    at, batch = states(cohort, 1), CohortBatch.of(batches("classification", [3]))
    plain = works(job())
    plain[0].private = None
    mine, expected = private.gradients(cohort, at, batch, plain, 0), cohort.gradients(at, batch)
    assert torch.equal(mine[0], expected[0]) and torch.equal(mine[1], expected[1])


def test_a_plan_for_private_jobs_is_measured_on_private_steps(monkeypatch):
    seen = []
    monkeypatch.setattr(Cohort, "each_sample", lambda c, *a: seen.append(len(a[0])) or iter(()))
    probe = Probe(lambda *_: build("bert", dtype=torch.float32), batches("classification", [2]), SGD(), private=job())
    probe.seconds(Plan(), 3, repeats=1)
    assert seen == [3, 3]
    probe.private = None
    probe.seconds(Plan(), 3, repeats=1)
    assert seen == [3, 3]
