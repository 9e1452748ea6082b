"""Adapters of factors through Flower messages: a run is the plain loop that it stands for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fl.server_app
from clients.models import TinyEncoder
from fl import checkpoint
from fl.experiment import BASE_SEED, Experiment
from fl.initialise import initialise
from fl.records import read_run
from fl.run import resume
from fl.server_app import Server
from fl.state import ServerState
from tests.helpers import SHARED, clients, evaluations, go, rounds
from tests.oracles import federated_loop
from tests.oracles import low_rank_cohort as dense
from tests.test_resume import killed_at, moments, same_end

HEAD = "model.head_std=0.1"  # so that gradients reach the adapter from the first step on
STEPS = ("local.steps=3", "local.lr=0.01", HEAD)
ADAPTERS = {
    "lora": ("adapter=lora", "adapter.rank=4"),
    "ffa": ("adapter=ffa", "adapter.rank=4", "adapter/init=orthonormal"),
    "rolora": ("adapter=rolora", "adapter.rank=4"),
    "lora_xs": ("adapter=lora_xs", "adapter.rank=4"),
    "lora_sb": ("adapter=lora_sb", "adapter.rank=4", "adapter.alpha=6", "adapter.init.eta0=0.01"),
}
OWN = {
    "lora": ["fedavg", "fedex", "flora", "flexlora", "hetlora"],
    "ffa": ["fedavg", "fedsvd"],
    "rolora": ["fedavg", "rolora"],
    "lora_xs": ["fedavg", "fedsb"],
    "lora_sb": ["fedavg", "fedsb"],
}
PAIRS = [(a, g) for a, rules in OWN.items() for g in rules]
# These give the product in other factors.
REFACTORS = ("flora", "flexlora", "fedsvd")


class Seen:
    """The server's states at the start and after each round, and the experiment."""

    def __init__(self) -> None:
        self.states: list[ServerState] = []
        self.experiment: Experiment | None = None


@pytest.fixture
def seen(monkeypatch) -> Seen:
    found, mark = Seen(), Server._mark

    def starting(world, experiment):
        found.experiment, found.states = experiment, []
        return initialise(world, experiment)

    def marking(server, world):
        found.states.append(world.server)
        mark(server, world)

    monkeypatch.setattr(fl.server_app, "initialise", starting)
    monkeypatch.setattr(Server, "_mark", marking)
    return found


def end(folder: Path, space) -> ServerState:
    arrays, meta = checkpoint.load(folder / "checkpoint")
    return ServerState.from_parts(arrays, meta["server"], space)


def total(state: ServerState) -> dict[str, np.ndarray]:
    """What each weight has changed by, the base's part included, and the head."""
    found = {low.name: low.left @ low.right for low in state.space.delta(state.vector)}
    for name, piece in state.base.items():
        found[name] = found[name] + piece.matrix().astype(np.float64)
    heads = [n for n in state.layout.names if n not in state.space.of_tensor]
    return found | {n: state.space.tensor(state.vector, n) for n in heads}


def alike(mine: ServerState, theirs: ServerState, begun: ServerState, within: float = 2e-3) -> None:
    """The weights moved by the same, relative to how far they moved."""
    first, second, start = total(mine), total(theirs), total(begun)
    assert first.keys() == second.keys()
    for name in first:
        moved = np.linalg.norm(second[name] - start[name])
        assert moved > 1e-3
        assert np.linalg.norm(first[name] - second[name]) < within * moved


def plain_base() -> torch.nn.Module:
    return TinyEncoder(head_std=0.1).load(3, BASE_SEED, dtype=torch.float64).module


def by_hand(seen: Seen, start: ServerState, number: int) -> ServerState:
    """``number`` rounds of the mean over clients, on dense models in float64: the rank and scale of each its own."""
    experiment, space = seen.experiment, start.space
    settings, data, base = experiment.settings, experiment.data, plain_base()
    vector = start.vector.astype(np.float64)
    share = np.array([len(p) for p in data.parts]) / sum(len(p) for p in data.parts)
    for round in range(1, number + 1):
        groups, new = space.trains(round), vector.copy()
        new[space.columns(groups)] = 0  # what a client of a lower rank does not own counts as zero
        for client, part in enumerate(data.parts):
            mine = dense.own(settings.adapter, space, vector, client)
            turn = client % len(settings.adapter.ranks)
            batches = settings.local.batches(settings.seed, client, round, part)
            tokens = [data.train.batch(b) for b in batches]
            scale = settings.adapter.scalings[turn]
            done = dense.train(base, space, mine, groups, tokens, settings.local.lr, weight_decay=0.0, scale=scale)
            ends = {n: tensor.numpy() for n, tensor in done.items()}
            for module in space.modules:
                last = module.core or module.b
                if last in ends:
                    ends[last] = ends[last] * scale / module.scale
            for name, value in ends.items():
                block = tuple(slice(n) for n in value.shape)
                space.tensor(new, name)[block] += share[client] * value
        vector = new
    return start.replace(vector=vector)


@pytest.mark.parametrize(("adapter", "aggregator"), PAIRS)
def test_one_client_and_one_round_is_centralised_training_of_that_adapter(tmp_path, seen, adapter, aggregator):
    """Against torch.optim.AdamW on the plain PEFT model, and on the dense model that knows nothing of PEFT."""
    words = (*ADAPTERS[adapter], f"aggregator={aggregator}", *STEPS, "clients.number=1", "schedule.rounds=1")
    go(tmp_path / "run", *words)
    start, experiment = seen.states[0], seen.experiment
    space, settings = start.space, experiment.settings
    state = end(tmp_path / "run", space)
    assert np.array_equal(state.vector, seen.states[-1].vector)
    groups = space.trains(1)
    layout, columns = space.sublayout(groups), space.columns(groups)
    model = experiment.cohort(torch.float32, "sdpa", "cpu").unstacked(torch.from_numpy(start.vector.copy()))
    batches = settings.local.batches(settings.seed, 0, 1, experiment.data.parts[0])
    trained = federated_loop.train(
        model, layout, torch.from_numpy(start.vector[columns]), experiment.data.train, batches,
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0),
    )  # fmt: skip
    vector = start.vector.copy()
    vector[columns] = trained.numpy()
    alike(state, start.replace(vector=vector), start)
    alike(state, by_hand(seen, start, 1), start)
    if aggregator not in REFACTORS:
        moved = np.linalg.norm(vector - start.vector)
        assert np.linalg.norm(state.vector - vector) < 2e-3 * moved
        frozen = np.setdiff1d(np.arange(len(vector)), columns)
        assert np.array_equal(state.vector[frozen], start.vector[frozen])


@pytest.mark.parametrize(
    ("adapter", "more"),
    [
        ("ffa", ()),
        ("rolora", ()),
        ("lora_xs", ()),
        ("lora_sb", ("aggregator=fedsb",)),
        ("ffa", ("adapter.rank=[2,4]", "adapter.alpha=[3,5]")),
        ("rolora", ("adapter.rank=[2,4]",)),
        ("lora_xs", ("adapter.rank=[2,4]", "adapter.alpha=[3,5]")),
        ("ffa", ("adapter.rank=[4,4]", "adapter.alpha=[3,5]")),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, tuple) else v,
)
def test_several_rounds_are_the_mean_over_dense_models_of_each_clients_rank(tmp_path, seen, adapter, more):
    """Uneven clients, three rounds, frozen factors kept by the clients; mixed ranks and scales too."""
    words = (*ADAPTERS[adapter], *STEPS, "local.steps=2", "clients.number=3", "partition=dirichlet", *more)
    go(tmp_path / "run", *words, "schedule.rounds=3")
    start = seen.states[0]
    assert start.space.mixed == any("[2,4]" in word for word in more)
    assert len({len(p) for p in seen.experiment.data.parts}) > 1
    alike(seen.states[-1], by_hand(seen, start, 3), start, within=0.01)


def test_rolora_trains_b_first_then_a(tmp_path, seen):
    go(tmp_path / "run", *ADAPTERS["rolora"], *STEPS, "aggregator=rolora", "schedule.rounds=4")
    space = seen.states[0].space
    for round, (old, new) in enumerate(zip(seen.states, seen.states[1:]), 1):
        moved = {g: bool((old.vector != new.vector)[space.columns((g,))].any()) for g in space.names}
        assert moved == {"A": round % 2 == 0, "B": round % 2 == 1, "head": True}
    # Up goes the factor of the round, down the one of the round before; nothing is sent twice.
    sizes = {g: 4 * len(space.columns((g,))) for g in space.names}
    up = {r: {c["bytes_up"] for c in clients(tmp_path / "run", r)} for r in range(1, 5)}
    down = {r: {c["bytes_down"] for c in clients(tmp_path / "run", r)} for r in range(1, 5)}
    for round in range(1, 5):
        mine, other = ("B", "A") if round % 2 else ("A", "B")
        assert all(0 < b - sizes[mine] - sizes["head"] < 400 for b in up[round])
        expected = sum(sizes.values()) if round == 1 else sizes[other] + sizes["head"]
        assert all(0 < b - expected < 500 for b in down[round])


@pytest.mark.parametrize(("adapter", "group"), [("ffa", "B"), ("lora_xs", "R"), ("lora_sb", "R")])
def test_only_what_trains_travels_after_the_first_round(tmp_path, seen, adapter, group):
    go(tmp_path / "run", *ADAPTERS[adapter], *STEPS, "schedule.rounds=3")
    space = seen.states[0].space
    size = 4 * len(space.columns((group, "head")))
    first, *later = rounds(tmp_path / "run")
    assert first["bytes_once"] == 4 * 4 * (space.layout.size - size // 4)
    for event in later:
        assert event["bytes_once"] == 0
        assert 0 < event["bytes_up"] - 4 * size < 4 * 400 and 0 < event["bytes_down"] - 4 * size < 4 * 500
        assert event["bytes_down"] < first["bytes_down"] - first["bytes_once"] + 100
    for state in seen.states:
        frozen = np.setdiff1d(np.arange(space.layout.size), space.columns((group, "head")))
        assert np.array_equal(state.vector[frozen], seen.states[0].vector[frozen])


RESUMED = {
    "ffa": ("ffa", "network.dropout=0.3", "clients.per_round=2"),
    "rolora": ("rolora", "aggregator=rolora", "network.dropout=0.3", "clients.per_round=2"),
    "lora_sb": ("lora_sb", "aggregator=fedsb", "clients.per_round=2"),
    "fedex": ("lora", "aggregator=fedex", "network.dropout=0.3", "clients.per_round=2"),
    "fedsvd, mixed": ("ffa", "aggregator=fedsvd", "adapter.rank=[2,4]", "clients.per_round=2"),
}


@pytest.mark.parametrize("part", [0.7, pytest.param(0.3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c.startswith("fed") else c for c in RESUMED]
)
def test_killed_and_resumed_ends_the_same(tmp_path, case, part):
    """What clients hold, and what the server knows of it, is in the checkpoint."""
    adapter, *more = RESUMED[case]
    words = (*ADAPTERS[adapter], "local.steps=1", HEAD, "clients.number=3", "schedule.rounds=4", *more)
    count = moments(tmp_path / "whole", *words)
    killed_at(int(part * count), tmp_path / "run", *words)
    resume(tmp_path / "run", shared=SHARED, quiet=True)
    same_end(tmp_path / "run", tmp_path / "whole")
    arrays, meta = checkpoint.load(tmp_path / "whole" / "checkpoint")
    assert any(name.startswith("holdings/state/") for name in arrays) and meta["downlink"]["known"]


@pytest.mark.parametrize(
    ("adapter", "more"),
    [
        ("lora", ()),
        ("ffa", ()),
        ("rolora", ()),
        pytest.param("lora_xs", (), marks=pytest.mark.slow),
        ("lora_sb", ()),
        pytest.param("lora", ("aggregator=fedex",), marks=pytest.mark.slow),
        ("lora", ("aggregator=flora", "adapter.rank=[2,4]")),
        ("ffa", ("adapter.rank=[2,4]", "adapter.alpha=[3,5]")),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, tuple) else v,
)
def test_the_cohorts_size_changes_rounding_at_most(tmp_path, seen, adapter, more):
    words = (*ADAPTERS[adapter], HEAD, "local.lr=0.01", "clients.number=5", *more)
    ends = []
    for name, plan in (("one", ("engine.cohort_size=1",)), ("four", ("engine.cohort_size=4",))):
        go(tmp_path / name, *words, *plan)
        ends.append((seen.states[0], seen.states[-1]))
    (start, one), (_, four) = ends
    alike(one, four, start, within=0.01)


def test_worker_processes_change_no_bit(tmp_path, seen):
    """They are told of changes of the base by number, and forget the oldest."""
    words = ("adapter.rank=2", "aggregator=fedex", HEAD, "local.steps=1", "clients.number=3", "schedule.rounds=6",
             "engine.cohort_size=1")  # fmt: skip
    go(tmp_path / "one", *words)
    one = seen.states[-1]
    go(tmp_path / "two", *words, "engine.workers=2")
    two = seen.states[-1]
    assert np.array_equal(one.vector, two.vector)
    for name, matrix in total(one).items():
        assert np.array_equal(matrix, total(two)[name])
    assert one.base


@pytest.mark.parametrize(
    ("adapter", "aggregator"),
    [
        ("ffa", "fedavg"), ("ffa", "fedsvd"), ("lora_xs", "fedavg"), ("lora_xs", "fedsb"), ("lora_sb", "fedsb"),
        ("rolora", "rolora"), ("lora", "flora"), ("lora", "flexlora"), ("lora", "hetlora"), ("lora", "fedex"),
    ],
)  # fmt: skip
def test_mixed_ranks_run_to_the_end_and_send_their_own_block(tmp_path, seen, adapter, aggregator):
    words = (*ADAPTERS[adapter], f"aggregator={aggregator}", "local.steps=1", HEAD, "schedule.rounds=2")
    go(tmp_path / "run", *words, "adapter.rank=[2,4]")
    run = read_run(tmp_path / "run")
    assert run["status"] == "completed" and run["final"]["rejected_updates"] == 0
    space = seen.states[0].space
    for round in (1, 2):
        for event in clients(tmp_path / "run", round):
            own = 4 * len(space.columns(space.trains(round), event["client"]))
            assert 0 < event["bytes_up"] - own < 400
    small, large = (len(space.columns(space.trains(1), c)) for c in (0, 1))
    assert small < large == len(space.columns(space.trains(1), 3))


@pytest.mark.parametrize(
    "more",
    [("ffa", "adapter.alpha=[3,5]"), ("rolora",), ("lora", "aggregator=fedex"), ("lora_xs",)],
    ids="+".join,
)
def test_a_client_evaluates_its_own_block_over_the_changed_base(tmp_path, seen, more):
    adapter, *rule = more
    words = (*ADAPTERS[adapter], *rule, "adapter.rank=[2,4]", HEAD, "local.lr=0.03", "evaluation.clients=always")
    go(tmp_path / "run", *words, "data.client_test_fraction=0.2", "clients.per_round=2")
    data, made, base = seen.experiment.data, seen.experiment.settings.adapter, plain_base()
    for state, event in zip(seen.states, evaluations(tmp_path / "run", "clients"), strict=True):
        more = {name: torch.from_numpy(p.matrix()).double() for name, p in state.base.items()}
        expected = []
        for client, examples in enumerate(data.client_tests):
            tensors = dense.own(made, state.space, state.vector.astype(np.float64), client)
            scale = made.scalings[client % 2]
            expected.append(dense.loss(base, state.space, tensors, data.train.batch(examples), scale, more).item())
        assert event["loss_mean"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert len(seen.states) == 3 and bool(seen.states[-1].base) == (rule == ["aggregator=fedex"])
