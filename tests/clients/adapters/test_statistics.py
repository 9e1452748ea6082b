"""Statistics for initialisations against autograd on the plain model's own weights, a sample at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification

from clients.adapters import statistics
from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.cohort import Cohort, CohortBatch
from clients.data.batch import Batch
from clients.models import Base
from fl.errors import ConfigError
from fl.keys import seeded_globals, torch_generator
from tests.oracles.cohorts import build, states
from tests.oracles.models import FAMILIES, VOCABULARY, batches, tiny
from tests.oracles.peft_loop import sample_loss

KINDS = ["gradient", "moment"]


def albert() -> Base:
    """Two layers that are one and the same: each linear layer is called twice."""
    config = AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=12, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_labels=3, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    with seeded_globals("albert"):
        module = AlbertForSequenceClassification(config).double().eval().requires_grad_(False)
    return Base(module, None, "classification", "classifier", "tiny-albert", "albert")


def base(family: str) -> tuple[Base, list[str]]:
    return (albert(), ["query", "ffn"]) if family == "albert" else tiny(family, dtype=torch.float64)


def cohort_of(family: str, targets: list[str] | None = None) -> Cohort:
    model, default = base(family)
    return Cohort(LoRA(rank=3).attach(model, targets or default, seed=1).double(), model.task)


def sample_of(cohort: Cohort, sizes: list[int], seed: int = 0) -> list[Batch]:
    return batches(cohort.task, sizes, seed)


def slow(family: str, cohort: Cohort, batch: Batch, kind: str) -> list[dict[str, Tensor]]:
    """Of each sample by itself, without padding: d loss / d W by autograd, or the sum of x x^T of the inputs seen."""
    plain = base(family)[0].module
    names = {path: path.removeprefix("base_model.model.") for path in statistics.layers(cohort)}
    modules = {path: plain.get_submodule(name) for path, name in names.items()}
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(args[0]))
        for path, module in modules.items()
    ]
    found = []
    for row in range(len(batch)):
        seen.clear()
        for module in modules.values():
            module.weight.requires_grad_()
            module.weight.grad = None
        sample_loss(plain, batch, row).backward()
        if kind == "gradient":
            grads = {p: m.weight.grad.clone() for p, m in modules.items()}
            found.append({p: g if isinstance(modules[p], nn.Linear) else g.T for p, g in grads.items()})
        else:
            flat = {p: torch.cat([x.detach().flatten(0, -2) for x in calls]) for p, calls in seen.items()}
            found.append({p: x.T @ x for p, x in flat.items()})
    for handle in handles:
        handle.remove()
    return found


def norm(statistic: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(z.square().sum()) for z in statistic.values()))


def added(parts: list[dict[str, Tensor]], weights: list[float] | None = None) -> dict[str, Tensor]:
    weights = weights or [1.0] * len(parts)
    return {p: sum(w * part[p] for w, part in zip(weights, parts, strict=True)) for p in parts[0]}


def agree(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for path in mine:
        assert mine[path].dtype == torch.float64 and theirs[path].norm() > 0
        torch.testing.assert_close(mine[path], theirs[path], rtol=1e-9, atol=1e-9 * float(theirs[path].abs().max()))


@pytest.mark.parametrize("family", [*FAMILIES, "albert"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_sum_over_samples_by_themselves(family, kind):
    """Samples are of different lengths and padded here, and not there: padding counts for nothing."""
    cohort = cohort_of(family)
    (batch,) = sample_of(cohort, [6])
    assert batch.attention_mask.min() == 0
    mine = statistics.collect(cohort, CohortBatch.of([batch]), kind)
    agree(mine, added(slow(family, cohort, batch, kind)))
    for path, (d, k) in statistics.shapes(cohort).items():
        assert mine[path].shape == ((d, k) if kind == "gradient" else (k, k))


def test_names_shapes_and_weights_are_those_of_the_plain_model_s_modules():
    for family in FAMILIES:
        cohort, plain = cohort_of(family), base(family)[0].module
        found = statistics.layers(cohort)
        assert len(found) == 2 * len(base(family)[1])
        for path, layer in found.items():
            module = plain.get_submodule(path.removeprefix("base_model.model."))
            theirs = module.weight if isinstance(module, nn.Linear) else module.weight.T
            assert torch.equal(statistics.weight(layer), theirs)
            assert statistics.shapes(cohort)[path] == tuple(theirs.shape)
        if family == "gpt2":
            assert set(statistics.shapes(cohort).values()) == {(72, 24)}


@pytest.mark.parametrize("family", [*FAMILIES, "albert"])
@pytest.mark.parametrize("kind", KINDS)
def test_clipping_is_per_sample_over_all_modules_together(family, kind):
    cohort = cohort_of(family)
    (batch,) = sample_of(cohort, [6])
    alone = slow(family, cohort, batch, kind)
    norms = sorted(norm(z) for z in alone)
    clip = (norms[2] + norms[3]) / 2  # half of the samples are clipped
    weights = [min(1.0, clip / norm(z)) for z in alone]
    assert sum(w == 1 for w in weights) == 3
    agree(statistics.collect(cohort, CohortBatch.of([batch]), kind, clip), added(alone, weights))


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_that_bounds_nothing_changes_nothing(kind):
    cohort = cohort_of("bert")
    batch = CohortBatch.of(sample_of(cohort, [5]))
    mine = statistics.collect(cohort, batch, kind, clip=1e9)
    assert all(torch.equal(mine[p], z) for p, z in statistics.collect(cohort, batch, kind).items())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_samples_differ_by_the_clip_at_most(family, kind):
    """And by no less where the example is clipped: the noise is right for the bound, not for less."""
    cohort = cohort_of(family)
    (whole,) = sample_of(cohort, [5])
    clip = 0.3 * min(norm(z) for z in slow(family, cohort, whole, kind))

    def sent(rows: list[int]) -> Tensor:
        part = Batch(whole.input_ids[rows], whole.attention_mask[rows], whole.labels[rows])
        return statistics.pack(statistics.collect(cohort, CohortBatch.of([part]), kind, clip), kind)

    everyone = sent([0, 1, 2, 3, 4])
    for left_out in range(5):
        others = sent([row for row in range(5) if row != left_out])
        assert (everyone - others).norm().item() == pytest.approx(clip, rel=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "clip"), [("gradient", None), ("gradient", 0.5), ("moment", None), ("moment", 5.0)])
def test_clients_add_up_to_the_pooled_sample(family, kind, clip):
    cohort = cohort_of(family)
    pooled = statistics.collect(cohort, CohortBatch.of(sample_of(cohort, [7])), kind, clip)
    parts = [statistics.collect(cohort, CohortBatch.of([part]), kind, clip) for part in sample_of(cohort, [4, 1, 2])]
    agree(statistics.total(parts), pooled)
    flat = sum(statistics.pack(part, kind) for part in parts)
    agree(statistics.unpack(flat, statistics.shapes(cohort), kind), pooled)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_samples_count_for_nothing(kind):
    cohort = cohort_of("bert")
    wide = CohortBatch.of(sample_of(cohort, [3, 6]))
    first = CohortBatch(wide.input_ids[:1], wide.attention_mask[:1], wide.labels[:1], wide.weights[:1], [3])
    assert first.input_ids.shape[1] == 6
    for clip in (None, 0.1):
        mine = statistics.collect(cohort, first, kind, clip)
        agree(mine, statistics.collect(cohort, CohortBatch.of(sample_of(cohort, [3, 6])[:1]), kind, clip))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_sees_one_row_a_sample_counts_once(kind):
    cohort = cohort_of("bert", ["pooler.dense", "query"])
    (batch,) = sample_of(cohort, [4])
    assert "base_model.model.bert.pooler.dense" in statistics.layers(cohort)
    for clip in (None, 0.2):
        alone = slow("bert", cohort, batch, kind)
        weights = [1.0 if clip is None else min(1.0, clip / norm(z)) for z in alone]
        agree(statistics.collect(cohort, CohortBatch.of([batch]), kind, clip), added(alone, weights))


def test_dropout_is_off():
    cohort = build("bert", LoRA(rank=3), dropout=0.5)
    (batch,) = sample_of(cohort, [4])
    keyed = CohortBatch.of([batch], keys=[("a", 1)])
    mine = statistics.collect(cohort, keyed, "gradient")
    agree(mine, statistics.collect(cohort, CohortBatch.of([batch]), "gradient"))
    agree(mine, added(slow("bert", cohort, batch, "gradient")))


def test_a_state_says_where_the_model_stands():
    """With a change s B A that is not zero it is the gradient at W0 + s B A, whose product with s B and A is known."""
    cohort = build("llama", LoRA(rank=3, alpha=5.0))
    state, (batch,) = states(cohort, 1)[0], sample_of(cohort, [4])
    mine = statistics.collect(cohort, CohortBatch.of([batch]), "gradient", state=state)
    tensors = cohort.layout.views(state)
    grads = cohort.layout.views(cohort.gradients(state[None], CohortBatch.of([batch]))[1][0])
    for path, g in mine.items():
        a, b = (f"{path}.lora_{x}.default.weight" for x in "AB")
        # Cohort losses are means over the four samples.
        torch.testing.assert_close(5 / 3 * tensors[b].T @ g / 4, grads[a], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(5 / 3 * g @ tensors[a].T / 4, grads[b], rtol=1e-9, atol=1e-12)


def test_nothing_is_left_behind_on_the_model():
    cohort = cohort_of("gpt2")
    batch = CohortBatch.of(sample_of(cohort, [3]))
    for kind in KINDS:
        statistics.collect(cohort, batch, kind)
    assert not any(m._forward_hooks for m in cohort.model.modules())
    assert not any(layer.weight.requires_grad or layer.weight.grad for layer in statistics.layers(cohort).values())
    broken = CohortBatch(batch.input_ids + 10_000, batch.attention_mask, batch.labels, batch.weights, batch.counts)
    with pytest.raises(IndexError):
        statistics.collect(cohort, broken, "gradient")
    assert not any(m._forward_hooks for m in cohort.model.modules())


def test_a_base_in_bfloat16_gives_float64_sums():
    model, targets = tiny("bert", dtype=torch.bfloat16)
    cohort = Cohort(LoRA(rank=3).attach(model, targets, seed=1), model.task)
    (batch,) = sample_of(cohort, [4])
    for kind in KINDS:
        mine = statistics.collect(cohort, CohortBatch.of([batch]), kind)
        theirs = added(slow("bert", cohort_of("bert"), batch, kind))
        for path, z in mine.items():
            assert z.dtype == torch.float64
            assert (z - theirs[path]).norm() < 0.1 * theirs[path].norm()


def test_other_adapters_and_slots_are_refused():
    batch = CohortBatch.of(sample_of(cohort_of("llama"), [2, 2]))
    with pytest.raises(ValueError, match="of 2 slots"):
        statistics.collect(cohort_of("llama"), batch, "gradient")
    with pytest.raises(ValueError, match="kind 'hessian'"):
        statistics.collect(cohort_of("llama"), batch, "hessian")
    for adapter in (Peft(method="vera", rank=5), LoRA(rank=3, dora=True)):
        with pytest.raises(ConfigError, match=r"adapter\.init=.*linear layers"):
            statistics.layers(build("llama", adapter))
    with pytest.raises(ConfigError, match=r"adapter\.init=.*linear layers"):
        statistics.layers(build("llama", LoRA(rank=3, target_modules=["embed_tokens"])))


SHAPES = {"one": (3, 5), "two": (4, 2)}


def random_statistic(kind: str) -> dict[str, Tensor]:
    generator = torch_generator("statistic", kind)
    drawn = {p: torch.randn(d, k, generator=generator, dtype=torch.float64) for p, (d, k) in SHAPES.items()}
    return drawn if kind == "gradient" else {p: z.T @ z for p, z in drawn.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_holds_all_modules_and_their_common_norm(kind):
    statistic = random_statistic(kind)
    flat = statistics.pack(statistic, kind)
    assert flat.shape == (statistics.layout(SHAPES, kind).size,) == ((23,) if kind == "gradient" else (18,))
    assert flat.norm().item() == pytest.approx(norm(statistic), rel=1e-12)
    back = statistics.unpack(flat, SHAPES, kind)
    for path, z in statistic.items():
        torch.testing.assert_close(back[path], z, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="scalars"):
        statistics.unpack(flat[1:], SHAPES, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_vector_as_it_travels_is_accepted(kind):
    statistic = random_statistic(kind)
    back = statistics.unpack(statistics.pack(statistic, kind).float(), SHAPES, kind)
    for path, z in statistic.items():
        assert back[path].dtype == torch.float64
        torch.testing.assert_close(back[path], z, rtol=1e-6, atol=1e-6)
        assert kind == "gradient" or torch.equal(back[path], back[path].T)


def test_noise_has_the_stated_deviation_and_comes_from_its_key():
    flat = torch.linspace(-1, 1, 40_000, dtype=torch.float64)
    noisy = statistics.privatise(flat, clip=0.5, noise=3.0, generator=torch_generator("noise", 1))
    added_noise = noisy - flat
    assert added_noise.std().item() == pytest.approx(1.5, rel=0.02)
    assert abs(added_noise.mean().item()) < 0.03
    # Gaussian: 68.3 % within one deviation, 4.6 % beyond two.
    assert (added_noise.abs() < 1.5).double().mean().item() == pytest.approx(0.6827, abs=0.01)
    assert (added_noise.abs() > 3.0).double().mean().item() == pytest.approx(0.0455, abs=0.005)
    again = statistics.privatise(flat, 0.5, 3.0, torch_generator("noise", 1))
    other = statistics.privatise(flat, 0.5, 3.0, torch_generator("noise", 2))
    assert torch.equal(noisy, again) and not torch.equal(noisy, other)


def test_noise_on_a_moment_is_symmetric_and_smaller_off_the_diagonal():
    shapes = {"m": (1, 200)}
    flat = torch.zeros(statistics.layout(shapes, "moment").size, dtype=torch.float64)
    noisy = statistics.unpack(statistics.privatise(flat, 1.0, 2.0, torch_generator("noise")), shapes, "moment")["m"]
    assert torch.equal(noisy, noisy.T)
    assert noisy.diagonal().std().item() == pytest.approx(2.0, rel=0.15)
    assert noisy[*torch.triu_indices(200, 200, 1)].std().item() == pytest.approx(2 / math.sqrt(2), rel=0.03)
