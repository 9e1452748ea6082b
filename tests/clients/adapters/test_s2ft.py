"""Slices: which entries of the weights train, with which gradients, and that their mean is exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from aggregators.fedavg import FedAvg
from clients.adapters.s2ft import S2FT
from clients.cohort import Cohort, CohortBatch
from fl.config import build as build_settings
from fl.errors import ConfigError
from fl.keys import generator
from fl.state import ServerState, Update
from tests.oracles.cohorts import apart, expect, states
from tests.oracles.models import FAMILIES, batches, tiny
from tests.oracles.variants import merged, out_in, spaced, trained_alone, weight_gradients, weights

# Ends of the names of a family's modules: output channels here, input channels there.
SIDES = {
    "bert": (["query", "intermediate.dense"], ["attention.output.dense"]),
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
    "llama": (["v_proj", "up_proj"], ["o_proj", "down_proj"]),
    "opt": (["fc1"], ["fc2"]),
}


def both(family: str, rank: int = 3, **settings) -> S2FT:
    rows, columns = SIDES[family]
    return S2FT(rank=rank, rows=rows, columns=columns, **settings)


def slices(cohort: Cohort, seed: int = 3) -> torch.Tensor:
    """A state after some training: random slices, the selection as it is."""
    state = cohort.initial.double().clone()
    columns = torch.from_numpy(cohort.space.columns(cohort.space.trains(1)).copy())
    state[columns] += states(cohort, 1, seed)[0][columns]
    return state


def chosen(cohort: Cohort) -> dict[str, tuple[bool, list[int]]]:
    """Of each module: whether rows train, and the channels."""
    views, space = cohort.layout.views(cohort.initial), cohort.space
    group = dict(zip(space.layout.names, space.groups, strict=True))
    out = {}
    for m in space.modules:
        rows = group[m.a] == "slice"
        hot = views[m.b].T if rows else views[m.a]  # (rank, channels)
        assert torch.equal(hot.sum(1), torch.ones(m.rank)) and torch.equal(hot, (hot == 1).float())
        out[m.name.removeprefix("base_model.model.")] = (rows, hot.argmax(1).tolist())
    return out


def changes(family: str, cohort: Cohort, state: torch.Tensor) -> dict[str, torch.Tensor]:
    """Merged minus frozen weight ``(out, in)`` of each linear layer below the head."""
    frozen = tiny(family, dtype=torch.float64)[0].module
    new = {n: w.detach() for n, w in weights(merged(cohort, state)).items()}
    return {
        n: out_in(frozen, n, new[n] - w.detach()) for n, w in weights(frozen).items() if n in new and n != "classifier"
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_chosen_channels_change(family):
    cohort = spaced(family, both(family))
    picked, state = chosen(cohort), slices(cohort)
    stated = {d.name.removeprefix("base_model.model."): d.left @ d.right for d in cohort.space.delta(state.numpy())}
    assert {rows for rows, _ in picked.values()} == {True, False}
    for name, change in changes(family, cohort, state).items():
        if name not in picked:
            assert not change.any()
            continue
        rows, channels = picked[name]
        found = change.ne(0).any(1 if rows else 0).nonzero().flatten().tolist()
        assert found == sorted(channels) and len(set(channels)) == 3
        assert change.ne(0).sum() == 3 * change.shape[1 if rows else 0]  # dense: every entry of the slice
        np.testing.assert_allclose(stated[name], change, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_the_slice_of_the_whole_weights_gradient(family):
    cohort = spaced(family, both(family))
    state, batch = slices(cohort), batches(cohort.task, [3])[0]
    with trained_alone(cohort):
        part = state[torch.from_numpy(cohort.space.columns(cohort.space.trains(1)).copy())]
        _, grads = cohort.gradients(part[None], CohortBatch.of([batch]))
        found = {n: g[0] for n, g in cohort.layout.views(grads).items()}
    picked = chosen(cohort)
    modules = {m.name.removeprefix("base_model.model."): m for m in cohort.space.modules}
    whole = weight_gradients(merged(spaced(family, both(family)), state), batch)
    assert set(found) == {n for n, g in zip(cohort.layout.names, cohort.space.groups, strict=True) if g != "selection"}
    for name, (rows, channels) in picked.items():
        module = modules[name]
        mine = found[module.a if rows else module.b]
        expected = whole[name][channels] if rows else whole[name][:, channels]
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-11)
        assert mine.any()


def test_a_cohort_agrees_with_plain_peft():
    cohort = spaced("llama", both("llama"))
    at, lots = states(cohort, 2), batches(cohort.task, [2, 3])
    _, grads = cohort.gradients(at, CohortBatch.of(lots))
    for slot, batch in enumerate(lots):
        assert apart(grads[slot], expect(cohort, at[slot], batch)[1]) <= 1e-9


def test_the_change_begins_at_zero_and_only_slices_and_head_travel():
    cohort = spaced("bert", both("bert"))
    space = cohort.space
    assert all(not (d.left @ d.right).any() for d in space.delta(cohort.initial.numpy()))
    assert space.trains(1) == space.trains(2) and set(space.trains(1)) == {"slice", "head"} and space.constant
    # Two layers of query (24 in), intermediate.dense (24 in) and attention.output.dense (24 out); a head of 3 x 24 + 3.
    assert space.trainable == 2 * 3 * (24 + 24 + 24) + 3 * 24 + 3
    assert len(space.columns(("selection",))) == 2 * 3 * (24 + 40 + 24)


def mean(server: ServerState, updates: Sequence[Update]) -> ServerState:
    return FedAvg().aggregate(server, updates)


def test_averaging_slices_averages_the_weight_changes():
    """Over several clients, sizes and rounds of training away from the start."""
    cohort = spaced("gpt2", both("gpt2"))
    space, columns = cohort.space, cohort.space.columns(cohort.space.trains(1))
    server = ServerState(slices(cohort).numpy(), space)
    draws, counts = generator(0, "updates"), [5, 1, 12]
    updates = [Update(c, 1, 0, draws.normal(size=len(columns)), n, columns=columns) for c, n in enumerate(counts)]
    after = mean(server, updates)
    expected: dict[str, np.ndarray] = {}
    for update, n in zip(updates, counts, strict=True):
        theirs = server.vector.copy()
        theirs[columns] += update.vector
        for low in space.delta(theirs):
            expected[low.name] = expected.get(low.name, 0) + n / 18 * (low.left @ low.right)
    for low in space.delta(after.vector):
        np.testing.assert_allclose(low.left @ low.right, expected[low.name], rtol=1e-12, atol=1e-13)
    untouched = space.columns(("selection",))
    assert np.array_equal(after.vector[untouched], server.vector[untouched])


def test_coupled_modules_of_a_layer_take_the_same_channels_and_layers_others():
    """What comes out of up_proj goes into down_proj: 40 channels. v_proj and o_proj have 16 and 32, being grouped."""
    picked = chosen(spaced("llama", both("llama", rank=6)))
    by = {(n.split(".")[2], n.rsplit(".", 1)[1]): channels for n, (_, channels) in picked.items()}
    for layer in "01":
        assert by[layer, "up_proj"] == by[layer, "down_proj"]
        assert by[layer, "v_proj"] != by[layer, "o_proj"] != by[layer, "up_proj"]
    assert by["0", "up_proj"] != by["1", "up_proj"]


def test_the_selection_comes_from_the_seed_alone():
    first, again, other = (chosen(spaced("llama", both("llama"), seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_every_channel_is_chosen_alike_and_once():
    adapter = S2FT(rank=5)
    drawn = [adapter.selection("m.layers.0.q", 20, seed).tolist() for seed in range(400)]
    assert all(channels == sorted(set(channels)) and len(channels) == 5 for channels in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=20)
    assert counts.min() > 60 and counts.max() < 140  # 100 each on average


def test_without_a_word_the_rows_of_the_models_own_modules_train():
    picked = chosen(spaced("opt", S2FT(rank=2)))
    assert all(rows for rows, _ in picked.values()) and {n.rsplit(".", 1)[1] for n in picked} == {"q_proj", "fc1"}
    assert {n.rsplit(".", 1)[1] for n in chosen(spaced("opt", S2FT(rank=2, target_modules=["fc2"])))} == {"fc2"}
    columns = chosen(spaced("opt", S2FT(rank=2, columns=["fc2"], layers=[1])))
    assert [(n.rsplit(".", 2)[1:], rows) for n, (rows, _) in columns.items()] == [(["1", "fc2"], False)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 30}, r"adapter\.rank=30.*at most the 16 channels of .*v_proj"),
        ({"rows": ["v_proj", "no_proj"]}, r"adapter\.rows=\['no_proj'\]"),
        ({"columns": ["no_proj"], "rows": ["v_proj"]}, r"adapter\.columns=\['no_proj'\]"),
        (
            {"rows": ["v_proj"], "columns": ["self_attn.v_proj"]},
            r"adapter\.columns=.*no module that is in adapter\.rows",
        ),
        ({"rows": ["embed_tokens"]}, r"adapter\.target_modules='.*embed_tokens'.*linear layers"),
        ({"rows": ["v_proj"], "layers": [0, 7]}, r"adapter\.layers=\[0, 7\].*no layer 7"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_what_the_model_can_not_do_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        spaced("llama", S2FT(**{"rank": 3, "rows": ["v_proj"], **settings}))


def test_settings_that_contradict_are_refused():
    with pytest.raises(ConfigError, match=r"adapter\.target_modules=\['q_proj'\].*adapter\.rows"):
        build_settings({"target_modules": ["q_proj"], "rows": ["v_proj"]}, "adapter", S2FT)
    assert S2FT().form == "slice" and not S2FT().mixed_ranks
