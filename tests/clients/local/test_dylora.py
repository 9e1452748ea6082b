"""DyLoRA: which block a step trains, against PEFT models of just that rank."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.adapters.bra import BRA
from clients.adapters.ffa import FFA
from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.adapters.rolora import RoLoRA
from clients.adapters.sora import SoRA
from clients.cohort import Cohort, CohortBatch
from clients.local.dylora import DyLoRA, draw
from clients.local.optimizers import SGD
from clients.local.training import Work
from fl.errors import ConfigError
from tests.oracles.cohorts import states
from tests.oracles.models import batches
from tests.oracles.variants import of_rank, spaced, trained_alone, work


def job(client: int, rank: int, of: int, least: int = 1) -> Work:
    """A job of ``client`` whose first step draws ``rank`` of ``of``."""
    for examples in range(1, 200):
        found = work(client, examples)
        if DyLoRA(steps=1, min_rank=least).rank(of, draw(found, 0)) == rank:
            return found
    raise AssertionError("this rank is never drawn")


def split(cohort: Cohort, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module."""
    views = cohort.layout.views(flat)
    return {m.name: (views[m.a], views[m.b]) for m in cohort.space.modules}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradient_is_that_of_an_adapter_of_the_drawn_rank_at_the_same_alpha(family):
    cohort = spaced(family, LoRA(rank=4, alpha=6.0))
    at, both, drawn = states(cohort, 3), batches(cohort.task, [2, 3, 1]), [2, 4, 1]
    works = [job(c, b, 4) for c, b in enumerate(drawn)]
    losses, grads = DyLoRA(steps=1).gradient(cohort, at, CohortBatch.of(both), works, 0)
    targets = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[family]
    for slot, b in enumerate(drawn):
        block = {n: (x[:b], y[:, :b]) for n, (x, y) in split(cohort, at[slot]).items()}
        loss, expected = of_rank(family, targets, block, 6.0, both[slot])
        assert losses[slot].item() == pytest.approx(loss, rel=1e-9)
        for name, (a, low) in split(cohort, grads[slot]).items():
            torch.testing.assert_close(a[:b], expected[name][0], rtol=1e-7, atol=1e-11)
            torch.testing.assert_close(low[:, :b], expected[name][1], rtol=1e-7, atol=1e-11)
            assert not a[b:].any() and not low[:, b:].any() and a[:b].any()


def test_at_the_full_rank_it_is_plain_training():
    cohort = spaced("bert", LoRA(rank=3))
    at, batch = states(cohort, 1), CohortBatch.of(batches("classification", [4]))
    losses, grads = DyLoRA(steps=1).gradient(cohort, at, batch, [job(0, 3, 3)], 0)
    plain = cohort.gradients(at, batch)
    assert torch.equal(losses, plain[0]) and torch.equal(grads, plain[1])


def test_frozen_trains_the_last_of_the_drawn_rows_alone_and_the_head():
    cohort = spaced("bert", LoRA(rank=4))
    at, batch, works = states(cohort, 1), CohortBatch.of(batches("classification", [4])), [job(0, 3, 4)]
    _, whole = DyLoRA(steps=1).gradient(cohort, at, batch, works, 0)
    _, frozen = DyLoRA(steps=1, frozen=True).gradient(cohort, at, batch, works, 0)
    theirs = split(cohort, whole[0])
    for name, (a, b) in split(cohort, frozen[0]).items():
        assert torch.equal(a[2], theirs[name][0][2]) and torch.equal(b[:, 2], theirs[name][1][:, 2]) and a[2].any()
        assert not a[[0, 1, 3]].any() and not b[:, [0, 1, 3]].any()
    heads = [n for n in cohort.layout.names if "classifier" in n]
    for name in heads:
        assert torch.equal(cohort.layout.views(frozen)[name], cohort.layout.views(whole)[name])


@pytest.mark.parametrize(("adapter", "round"), [(FFA(rank=4, alpha=6.0), 1), (RoLoRA(rank=4, alpha=6.0), 2)])
def test_where_one_factor_trains_its_block_has_the_same_gradient(adapter, round):
    """Beside the other factor frozen: B with ffa, A in rolora's second round."""
    whole = spaced("llama", LoRA(rank=4, alpha=6.0))
    at, batch, works = states(whole, 1), CohortBatch.of(batches("causal_lm", [3])), [job(0, 2, 4)]
    expected = whole.layout.views(DyLoRA(steps=1).gradient(whole, at, batch, works, 0)[1])
    cohort = spaced("llama", adapter)
    with cohort.training(cohort.space.trains(round), at[0]):
        part = cohort.layout.flatten(dict(whole.layout.views(at)), lead=1)
        _, grads = DyLoRA(steps=1).gradient(cohort, part, batch, works, 0)
        for name, mine in cohort.layout.views(grads).items():
            torch.testing.assert_close(mine, expected[name], rtol=1e-10, atol=1e-13)


def test_modules_of_other_ranks_take_the_same_share_of_theirs():
    """Of 1 .. 8 and 1 .. 4, for the same draw: 5 or 6 and 3, say."""
    cohort = spaced("llama", LoRA(rank=8, rank_pattern={"v_proj": 4}))
    at, batch = states(cohort, 1), CohortBatch.of(batches("causal_lm", [3]))
    for b in range(1, 9):
        _, grads = DyLoRA(steps=1).gradient(cohort, at, batch, [job(0, b, 8)], 0)
        for name, (a, _) in split(cohort, grads[0]).items():
            rows = int(a.any(1).sum())
            assert rows == (b if "q_proj" in name else (b + 1) // 2)


def test_a_client_draws_from_its_own_rank():
    adapter = LoRA(rank=[4, 2], alpha=[8.0, 2.0])
    cohort = spaced("llama", adapter)
    at, both = states(cohort, 2), batches("causal_lm", [2, 3])
    works = [job(0, 3, 4), job(1, 1, 2)]
    with trained_alone(cohort, (0, 1)):
        losses, grads = DyLoRA(steps=1).gradient(cohort, at, CohortBatch.of(both), works, 0)
    for slot, (b, alpha) in enumerate([(3, 8.0), (1, 2.0)]):
        block = {n: (x[:b], y[:, :b]) for n, (x, y) in split(cohort, at[slot]).items()}
        loss, expected = of_rank("llama", ["q_proj", "v_proj"], block, alpha, both[slot])
        assert losses[slot].item() == pytest.approx(loss, rel=1e-9)
        for name, (a, _) in split(cohort, grads[slot]).items():
            torch.testing.assert_close(a[:b], expected[name][0], rtol=1e-7, atol=1e-11)


def test_every_rank_is_drawn_alike_and_none_below_the_smallest():
    local = DyLoRA(steps=1, min_rank=3)
    drawn = Counter(
        local.rank(6, draw(work(c, 5, steps=4, round=r), s)) for c in range(40) for r in (1, 2) for s in range(4)
    )
    assert sorted(drawn) == [3, 4, 5, 6] and min(drawn.values()) > 50  # 80 each on average
    assert local.rank(2, 0.99) == 2 and local.rank(6, 0.0) == 3


def test_the_draw_depends_on_client_round_step_and_examples_alone():
    base = draw(work(2, 4, steps=2, round=3), 1)
    assert base == draw(work(2, 4, steps=2, round=3), 1)
    other = work(2, 4, steps=2, round=3)
    other.batches[1] = other.batches[1][::-1]
    same = work(2, 4, steps=2, round=3)
    same.batches[1] = same.batches[0]
    changed = [
        draw(work(1, 4, steps=2, round=3), 1), draw(work(2, 4, steps=2, round=4), 1), draw(other, 1),
        draw(same, 0), draw(same, 1),
    ]  # fmt: skip
    assert len({base, *changed}) == 6


def test_a_slots_training_is_the_same_beside_others_and_alone():
    cohort = spaced("llama", LoRA(rank=4))
    at, both = states(cohort, 2).float().numpy(), batches("causal_lm", [2, 3])
    works = [Work(c, 1, at[c], work(c, 2 + c, steps=3).batches, 0.5) for c in range(2)]
    local = DyLoRA(steps=3, optimizer=SGD())

    def fit(slots: list[int]) -> list[np.ndarray]:
        made = local.fit(cohort, [works[s] for s in slots], lambda on, _: CohortBatch.of([both[slots[s]] for s in on]))
        return [f.state for f in made]

    together = fit([0, 1])
    for slot in range(2):
        np.testing.assert_allclose(together[slot], fit([slot])[0], rtol=1e-5, atol=1e-7)
        assert np.abs(together[slot] - works[slot].start).max() > 1e-3


@pytest.mark.parametrize("adapter", [BRA(), SoRA(), LoRA(dora=True)], ids=lambda a: type(a).__name__)
def test_other_adapters_are_refused(adapter):
    for fine in (LoRA(), FFA(), RoLoRA(), Peft(method="lora"), Peft(method="lora", rank=4)):
        DyLoRA(steps=1).check(fine)
    with pytest.raises(ConfigError, match="local='dylora'"):
        DyLoRA(steps=1).check(adapter)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"adapter\.rslora=True"):
        DyLoRA(steps=1).check(LoRA(rslora=True))
    with pytest.raises(ConfigError, match=r"adapter\.rslora=True"):
        DyLoRA(steps=1).check(Peft(method="lora", options={"use_rslora": True}))
    with pytest.raises(ConfigError, match=r"local\.min_rank=9 .*at most adapter\.rank"):
        DyLoRA(steps=1, min_rank=9).check(LoRA(rank=[4, 8], alpha=4.0))
