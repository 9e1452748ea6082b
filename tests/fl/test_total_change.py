"""The total change of a state as factors: against dense matrices in float64, on modules that are not square."""

import numpy as np
import pytest
import torch
from torch import nn

from clients.adapters.base_change import Piece
from clients.adapters.space import LowRank, Module, Space
from clients.layout import Layout
from clients.models import Base
from fl import total_change
from fl.keys import generator, seeded_globals
from fl.state import ServerState
from tests.oracles.models import tiny

# (out, in) of the modules: tall and wide.
SIZES = {"tall": (9, 6), "wide": (5, 11)}
RANK = 3


def state(core: str = "none", base: str = "none", seed: int = 0) -> ServerState:
    """A random state of two modules. ``core``: none, matrix, gate. ``base``: none, factors, many (more than the smaller
    side), matrix."""
    draw = generator("total", core, base, seed)
    names, shapes, modules = [], [], []
    for name, (d, k) in SIZES.items():
        tensors = {f"{name}.a": (RANK, k), f"{name}.b": (d, RANK)}
        if core != "none":
            tensors[f"{name}.r"] = (RANK, RANK) if core == "matrix" else (RANK,)
        names += list(tensors)
        shapes += list(tensors.values())
        modules.append(Module(name, f"{name}.a", f"{name}.b", 0.7, RANK, f"{name}.r" if core != "none" else None))
    layout = Layout(tuple(names), tuple(shapes))
    change = {}
    for name, (d, k) in SIZES.items():
        p = {"factors": 2, "many": 14}.get(base)
        if p:
            change[name] = Piece(draw.normal(size=(d, p)), draw.normal(size=(p, k)))
        elif base == "matrix":
            change[name] = Piece(draw.normal(size=(d, k)), None)
    return ServerState(draw.normal(size=layout.size), Space(layout, modules=tuple(modules)), base=change)


def dense(server: ServerState) -> dict[str, np.ndarray]:
    """Each module's total change as a matrix, from its definition."""
    out = {}
    for module in server.space.modules:
        a, b = (server.space.tensor(server.vector, n) for n in (module.a, module.b))
        core = np.eye(RANK) if module.core is None else server.space.tensor(server.vector, module.core)
        out[module.name] = module.scale * b @ (np.diag(core) if core.ndim == 1 else core) @ a
        if module.name in server.base:
            piece = server.base[module.name]
            out[module.name] = out[module.name] + (piece.left if piece.right is None else piece.left @ piece.right)
    return out


CASES = [(c, b) for c in ("none", "matrix", "gate") for b in ("none", "factors", "many", "matrix")]


@pytest.mark.parametrize(("core", "base"), CASES)
def test_it_is_the_dense_sum_at_its_exact_rank(core, base):
    server = state(core, base)
    expected, found = dense(server), total_change.total(server)
    assert [c.name for c in found.changes] == list(SIZES)
    for change in found.changes:
        rank = {"none": RANK, "factors": RANK + 2}.get(base, min(SIZES[change.name]))
        assert change.left.shape[1] == change.right.shape[0] == min(rank, *SIZES[change.name])
        assert change.left.dtype == change.right.dtype == np.float32
        np.testing.assert_allclose(
            change.left.astype(np.float64) @ change.right, expected[change.name], atol=3e-6, rtol=0
        )
    assert found.rank == found.needed == max(c.left.shape[1] for c in found.changes)
    assert found.relative_error < 1e-7
    assert not found.truncated


@pytest.mark.parametrize(("core", "base"), CASES)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_cut_leaves_out_the_tail_of_the_dense_singular_values(core, base, rank):
    server = state(core, base)
    expected, found = dense(server), total_change.total(server, rank)
    lost = size = 0.0
    for change in found.changes:
        u, s, vt = np.linalg.svd(expected[change.name], full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(change.left.astype(np.float64) @ change.right, best, atol=3e-6, rtol=0)
        assert change.left.shape[1] <= rank
        lost, size = lost + (s[rank:] ** 2).sum(), size + (s**2).sum()
    assert found.relative_error == pytest.approx(np.sqrt(lost / size), abs=1e-12)
    assert found.truncated == (found.needed > rank)
    assert found.needed == total_change.total(server).needed


def test_factors_that_cancel_leave_no_rank_behind():
    """The start of PiSSA: what the base loses is what the adapter has."""
    server = state()
    base = {}
    for change in server.space.delta(server.vector):
        base[change.name] = Piece(-change.left, change.right)
    found = total_change.total(server.replace(base=base))
    for change in found.changes:
        np.testing.assert_allclose(change.left @ change.right, 0, atol=1e-13)
    moved = server.replace(base={n: Piece(2 * p.left, p.right) for n, p in base.items()})
    again = total_change.total(moved)
    assert [c.left.shape[1] for c in again.changes] == [RANK, RANK]
    for change in again.changes:
        np.testing.assert_allclose(change.left @ change.right, -dense(server)[change.name], atol=3e-6)


def test_no_change_at_all_is_of_rank_one_and_error_zero():
    server = state()
    found = total_change.total(server.replace(vector=np.zeros_like(server.vector)))
    assert [c.left.shape[1] for c in found.changes] == [1, 1]
    assert not any(c.left.any() for c in found.changes)
    assert (found.needed, found.relative_error) == (1, 0.0)


@pytest.mark.parametrize(("spectrum", "kept"), [([1.0, 1e-3, 3e-8, 1e-8], 2), ([1.0, 1e-3, 5e-8, 5e-8, 5e-8, 5e-8], 5)])
def test_singular_values_that_are_together_below_the_rounding_are_dropped_and_counted(spectrum, kept):
    server = state()
    draw = generator("spectrum")
    u, v = (np.linalg.qr(draw.normal(size=(n, len(spectrum))))[0] for n in SIZES["tall"])
    base = {"tall": Piece(u * np.array(spectrum), v.T)}
    found = total_change.total(server.replace(vector=np.zeros_like(server.vector), base=base))
    assert found.changes[0].left.shape[1] == kept
    assert found.relative_error == pytest.approx(np.linalg.norm(spectrum[kept:]), rel=1e-4)


@pytest.mark.parametrize(("core", "base"), CASES)
def test_stacked_is_the_same_sum_without_a_decomposition(core, base):
    server = state(core, base)
    found, expected = total_change.stacked(server), dense(server)
    for change in found.changes:
        np.testing.assert_allclose(
            change.left.astype(np.float64) @ change.right, expected[change.name], atol=1e-5, rtol=0
        )
        columns = {"none": RANK, "factors": RANK + 2, "many": RANK + 14, "matrix": min(SIZES[change.name])}
        assert change.left.shape[1] == columns[base]


@pytest.mark.parametrize(
    ("core", "base", "plain"),
    [("none", "none", True), ("none", "factors", False), ("matrix", "none", False), ("gate", "matrix", False)],
)
def test_what_peft_reloads_as_it_is(core, base, plain):
    assert total_change.reloads(state(core, base)) is plain


def attached(base: Base, changes: list[LowRank]) -> nn.Module:
    empty = ServerState(np.zeros(0, np.float32), Space(Layout((), ())))
    return total_change.attach(base, changes, empty, train_head=False)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt"])
def test_the_adapter_changes_the_weights_by_the_change(family):
    """Against the same model with dense weights; GPT-2's Conv1D holds its weight the other way round."""
    (base, targets), (twin, _) = tiny(family), tiny(family)
    draw, changes = generator("attach", family), []
    for i, (name, module) in enumerate(list(twin.module.named_modules())):
        if name.endswith(tuple(targets)):
            turned = type(module).__name__ == "Conv1D"
            d, k = module.weight.shape[::-1] if turned else module.weight.shape
            left, right = draw.normal(size=(d, 1 + i % 4)), draw.normal(size=(1 + i % 4, k)) * 0.3
            changes.append(LowRank(f"base_model.model.{name}", left.astype(np.float32), right.astype(np.float32)))
            product = torch.from_numpy(left @ right).float()
            module.weight.data += product.T if turned else product
    ids, mask = torch.arange(2, 20).reshape(2, 9), torch.ones(2, 9, dtype=torch.long)
    model = attached(base, changes)
    with torch.no_grad():
        expected = twin.module(input_ids=ids, attention_mask=mask).logits
        found = model(input_ids=ids, attention_mask=mask).logits
        before = tiny(family)[0].module(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (before - expected).abs().max() > 1e-3
    config = model.peft_config["default"]
    assert config.lora_dropout == 0
    assert config.base_model_name_or_path == f"tiny-{family}"
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {1.0}


class Names(nn.Module):
    """Names that are ends of others, or match them as regular expressions."""

    def __init__(self):
        super().__init__()
        self.fc, self.aXb = nn.Linear(4, 5), nn.Linear(5, 4)
        self.a = nn.ModuleDict({"b": nn.Linear(4, 6), "fc": nn.Linear(6, 3), "last": nn.Linear(3, 7)})
        self.last = nn.Linear(7, 2)

    def forward(self, x):
        return self.last(self.a["last"](self.a["fc"](self.a["b"](self.aXb(self.fc(x))))))


def test_modules_are_meant_by_their_full_names():
    with seeded_globals("names"):
        module = Names()
    ranks = {"a.b": (6, 4, 1), "aXb": (4, 5, 2), "fc": (5, 4, 3), "a.fc": (3, 6, 4), "last": (2, 7, 5)}
    changes = [
        LowRank(f"base_model.model.{n}", np.ones((d, p), np.float32), np.ones((p, k), np.float32))
        for n, (d, k, p) in ranks.items()
    ]
    model = attached(Base(module, None, "causal_lm", None, "names", "names"), changes)
    found = {n.removesuffix(".lora_A.default.weight"): p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}
    assert found == {f"base_model.model.{n}": p for n, (_, _, p) in ranks.items()}
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {1.0}


def test_tensors_that_would_be_lost_are_refused():
    base, _ = tiny("opt")
    server = state()
    layout = Layout((*server.layout.names, "magnitude"), (*server.layout.shapes, (2,)))
    odd = ServerState(np.zeros(layout.size, np.float32), Space(layout, modules=server.space.modules))
    with pytest.raises(ValueError, match="magnitude"):
        total_change.attach(base, [], odd, train_head=False)
