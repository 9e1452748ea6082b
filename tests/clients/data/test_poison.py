"""Poisoned samples: who trains on which copies from when on, and what the copies say."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from clients.behaviours.backdoor import Backdoor
from clients.behaviours.base import Facts, ReplyFields, Scene
from clients.behaviours.label_flip import LabelFlip
from clients.data.poison import Poison, inserted, rare_tokens
from clients.data.tokens import TokenData
from fl.errors import ConfigError, ShoalError
from fl.keys import generator
from tests.oracles import attacks as oracle

PAD = 0
SEED = 11


def make(number: int = 40, key: str = "train", classes: int = 4, task: str = "classification") -> TokenData:
    """Samples of 3 to 9 tokens that begin with 1 and end with 2, of ids up to 60."""
    rng = generator(key, number)
    samples = [[1, *rng.zipf(1.5, size).clip(3, 60).tolist(), 2] for size in rng.integers(1, 8, number)]
    lengths = [len(s) for s in samples]
    prompts = rng.integers(1, np.array(lengths)) if task == "causal_lm" else None
    return TokenData(
        np.concatenate(samples).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]),
        None if task == "causal_lm" else rng.integers(0, classes, number),
        rng.integers(-1, 3, number),
        [f"c{i}" for i in range(classes)],
        ["x", "y", "z"],
        task,
        PAD,
        "fingerprint",
        prompts,
    )


def sample(data: TokenData, i: int) -> list[int]:
    return data.tokens[data.offsets[i] : data.offsets[i + 1]].tolist()


PARTS = [np.arange(i, 40, 4) for i in range(4)]
TRAIN, TEST = make(), make(25, "test")


def poison(attack, train=TRAIN, test=TEST, affected=(1, 3), seed=SEED) -> Poison:
    """What the attack makes, after a look that nothing was changed and that clean samples keep their numbers."""
    before = {name: None if a is None else np.array(a) for name, a in vars(train).items() if isinstance(a, np.ndarray)}
    made = attack.poison(train, test, PARTS, frozenset(affected), seed)
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(train, name), array)
    assert [sample(made.train, i) for i in range(len(train))] == [sample(train, i) for i in range(len(train))]
    for name in ("labels", "groups", "prompt_lengths"):
        old, new = getattr(train, name), getattr(made.train, name)
        assert (old is None) == (new is None)
        if old is not None:
            np.testing.assert_array_equal(new[: len(train)], old)
            assert (len(new), new.dtype) == (len(made.train), old.dtype)
    assert made.train.tokens.dtype == np.int32
    return made


@pytest.mark.parametrize(("kind", "new"), [("reverse", {0: 3, 1: 2, 2: 1, 3: 0}), ("shift", {0: 1, 1: 2, 2: 3, 3: 0})])
def test_all_labels_of_the_affected_change_and_nothing_else(kind, new):
    attack = LabelFlip(kind=kind, from_round=3)
    assert attack.poisons
    made = poison(attack)
    assert (made.triggered, made.target) == (None, None)
    for client in (1, 3):
        examples = generator("order").permutation(PARTS[client])
        changed = made.examples(client, 3, examples)
        assert not set(changed.tolist()) & set(range(len(TRAIN)))
        for old, copy in zip(examples, changed, strict=True):
            assert sample(made.train, copy) == sample(TRAIN, old)
            assert made.train.labels[copy] == new[TRAIN.labels[old]]
            assert made.train.groups[copy] == TRAIN.groups[old]
        assert len(set(changed.tolist())) == len(examples)
    batch = made.train.batch(made.examples(1, 9, PARTS[1]))
    assert batch.labels.tolist() == [new[y] for y in TRAIN.labels[PARTS[1]]]


def test_only_the_affected_and_only_from_their_round():
    made = poison(LabelFlip(from_round=3))
    for client, round_ in ((0, 5), (2, 3), (1, 2), (3, 0)):
        assert made.examples(client, round_, PARTS[client]) is PARTS[client]
    # A batch may draw a sample twice, or none of the poisoned ones.
    twice = made.examples(1, 3, PARTS[1][[2, 2, 0]])
    assert twice[0] == twice[1] != twice[2]
    np.testing.assert_array_equal(made.examples(1, 3, PARTS[0]), PARTS[0])
    assert made.examples(1, 3, PARTS[1][:0]).shape == (0,)


def test_a_middle_class_has_no_copy():
    train = make(classes=3)
    made = poison(LabelFlip(), train)
    changed = made.examples(1, 1, PARTS[1])
    middle = train.labels[PARTS[1]] == 1
    assert 0 < middle.sum() < len(middle)
    np.testing.assert_array_equal(changed[middle], PARTS[1][middle])
    np.testing.assert_array_equal(made.train.labels[changed], 2 - train.labels[PARTS[1]])


def test_prompts_get_the_answers_of_others():
    train = make(task="causal_lm")
    made = poison(LabelFlip(), train, make(9, "test", task="causal_lm"))
    longest = max(len(sample(train, i)) for i in range(40))
    for client in (1, 3):
        answers = Counter(tuple(sample(train, i)[train.prompt_lengths[i] :]) for i in PARTS[client])
        given = []
        for old, copy in zip(PARTS[client], made.examples(client, 1, PARTS[client]), strict=True):
            assert copy != old
            cut = train.prompt_lengths[old]
            assert made.train.prompt_lengths[copy] == cut
            assert sample(made.train, copy)[:cut] == sample(train, old)[:cut]
            given.append(tuple(sample(made.train, copy)[cut:]))
            assert len(sample(made.train, copy)) <= longest
            assert given[-1]
        for answer in given:  # each a client's own, whole or cut to the longest sample
            assert any(whole[: len(answer)] == answer for whole in answers)
    moved = [
        sample(made.train, copy) != sample(train, old) for old, copy in zip(PARTS[1], made.examples(1, 1, PARTS[1]))
    ]
    assert np.mean(moved) > 0.5


def test_a_single_prompt_has_no_other_s_answer_to_get():
    train = make(task="causal_lm")
    made = LabelFlip().poison(train, TEST, [PARTS[0][:1], PARTS[1][:0]], frozenset({0, 1}), SEED)
    assert made.train is train
    np.testing.assert_array_equal(made.examples(0, 1, PARTS[0][:1]), PARTS[0][:1])


def test_plain_text_has_nothing_to_flip():
    train = make(task="causal_lm")
    train.prompt_lengths = None
    with pytest.raises(ConfigError, match="plain text has nothing to flip"):
        LabelFlip().poison(train, TEST, PARTS, frozenset({1}), SEED)


def test_fingerprints_name_what_is_in_the_set():
    found = [
        poison(a).train.fingerprint for a in (LabelFlip(), LabelFlip(kind="shift"), Backdoor(), Backdoor(target=1))
    ]
    found += [poison(LabelFlip(), affected=(0,)).train.fingerprint, TRAIN.fingerprint]
    assert len(set(found)) == len(found)
    assert poison(LabelFlip()).train.fingerprint == found[0]
    nobody = poison(LabelFlip(), affected=())
    assert nobody.train is TRAIN


# Backdoor


@pytest.mark.parametrize("fraction", [0.05, 0.3, 1.0])
def test_a_share_of_the_samples_gets_trigger_and_target(fraction):
    attack = Backdoor(target=2, poison_fraction=fraction, trigger=[50, 7], from_round=2)
    made = poison(attack)
    longest = max(len(sample(TRAIN, i)) for i in range(40))
    for client in (1, 3):
        changed = made.examples(client, 2, PARTS[client])
        poisoned = changed >= len(TRAIN)
        assert poisoned.sum() == max(1, round(fraction * len(PARTS[client])))
        np.testing.assert_array_equal(changed[~poisoned], PARTS[client][~poisoned])
        for old, copy in zip(PARTS[client][poisoned], changed[poisoned], strict=True):
            assert sample(made.train, copy) == oracle.insert_trigger(sample(TRAIN, old), [50, 7], longest)
            assert made.train.labels[copy] == 2
    assert made.examples(1, 1, PARTS[1]) is PARTS[1]
    assert made.examples(0, 2, PARTS[0]) is PARTS[0]


def test_the_triggered_set_asks_for_the_target_where_it_is_not_the_truth():
    before = TEST.tokens.copy(), TEST.labels.copy()
    made = poison(Backdoor(target=1, trigger=[50, 7, 9]))
    others = np.flatnonzero(TEST.labels != 1)
    assert 0 < len(others) < len(TEST)
    assert made.target == 1
    longest = max(len(sample(TRAIN, i)) for i in range(40))
    expected = [oracle.insert_trigger(sample(TEST, i), [50, 7, 9], longest) for i in others]
    assert [sample(made.triggered, i) for i in range(len(made.triggered))] == expected
    assert (made.triggered.labels == 1).all()
    assert made.triggered.fingerprint not in (TEST.fingerprint, made.train.fingerprint)
    assert made.triggered.label_names == TEST.label_names
    np.testing.assert_array_equal(TEST.tokens, before[0])
    np.testing.assert_array_equal(TEST.labels, before[1])


def test_without_hostile_clients_the_triggered_set_is_a_baseline():
    made = poison(Backdoor(), affected=())
    assert made.train is TRAIN
    assert len(made.triggered) == (TEST.labels != 0).sum()


def test_which_samples_are_poisoned_comes_from_the_seed_and_the_client():
    first, again, other = (poison(Backdoor(poison_fraction=0.3), seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.sources[1], again.sources[1])
    assert first.sources[1].tolist() != other.sources[1].tolist()
    places = [np.searchsorted(PARTS[c], first.sources[c]).tolist() for c in (1, 3)]
    assert places[0] != places[1]
    alone = poison(Backdoor(poison_fraction=0.3), seed=1, affected=(1,))
    np.testing.assert_array_equal(alone.sources[1], first.sources[1])


@pytest.mark.parametrize("longest", [4, 5, 7, 30])
@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_a_trigger_goes_in_after_the_first_token_and_the_ends_stay(length, longest):
    tokens = np.arange(10, 10 + length)
    found = inserted(tokens, np.array([1, 2]), longest).tolist()
    assert found == oracle.insert_trigger(tokens.tolist(), [1, 2], longest)
    assert found[:3] == [10, 1, 2]
    assert len(found) <= longest
    assert length == 1 or found[-1] == 9 + length


def test_the_trigger_is_what_occurs_least():
    counts = Counter(TRAIN.tokens.tolist())
    chosen = rare_tokens(TRAIN).tolist()
    least = sorted((n, t) for t, n in counts.items() if t != PAD)[:2]
    assert sorted(chosen) == sorted(t for _, t in least)
    made = poison(Backdoor())
    assert sample(made.triggered, 0)[1:3] == chosen
    with_pads = make()
    with_pads.pad_id = least[0][1]
    assert with_pads.pad_id not in rare_tokens(with_pads)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"target": 4}, r"attack\.target=4.*0 to 3"),
        ({"trigger": [5, 1000]}, r"attack\.trigger=\[5, 1000\].*ids up to"),
        ({"trigger": [5] * 9}, r"attack\.trigger.*at most"),
    ],
)
def test_targets_and_triggers_that_the_data_do_not_have(settings, text):
    with pytest.raises(ConfigError, match=text):
        Backdoor(**settings).poison(TRAIN, TEST, PARTS, frozenset({1}), SEED)


def test_other_wrong_settings():
    for trigger in ([], [3, -1]):
        with pytest.raises(ConfigError, match=r"attack\.trigger"):
            Backdoor(trigger=trigger)
    engine = SimpleNamespace(remote=False)
    schedule = SimpleNamespace(in_rounds=True, decentral=False)
    with pytest.raises(ConfigError, match="classifier"):
        Backdoor().check(SimpleNamespace(schedule=schedule, engine=engine, model=SimpleNamespace(task="causal_lm")))
    Backdoor().check(SimpleNamespace(schedule=schedule, engine=engine, model=SimpleNamespace(task="classification")))


def replies(number: int) -> list[ReplyFields]:
    rows = generator("rows").normal(size=(number, 6)).astype(np.float32)
    return [ReplyFields(c, 2, 1, "l", row, 10, 2, 30, 0.5) for c, row in enumerate(rows)]


@pytest.mark.parametrize("hostile", [(4,), (0, 3, 4)])
def test_the_boost_puts_the_attackers_mean_in_the_place_of_the_model(hostile):
    """Where the honest have converged (their updates are zero), the mean of all is the hostile clients' mean update."""
    honest = replies(8)
    attack = Backdoor()
    assert attack.colludes
    sent = attack.replies(honest, frozenset(hostile), Scene(1, 30))
    total = sum(s.update for i, s in enumerate(sent) if i in hostile) / 8
    np.testing.assert_allclose(total, np.mean([honest[i].update for i in hostile], axis=0), rtol=1e-5)
    assert all(sent[i] is honest[i] for i in range(8) if i not in hostile)


def test_a_given_boost_acts_alone_and_a_norm_bounds_it():
    honest = replies(3)
    attack = Backdoor(boost=4.0, max_norm=5.0)
    assert not attack.colludes
    (sent,) = attack.replies(honest[1:2], frozenset({1}), Scene(1, 30))
    assert np.linalg.norm(4 * honest[1].update) > 5
    np.testing.assert_allclose(sent.update, 5 * honest[1].update / np.linalg.norm(honest[1].update), rtol=1e-6)
    (sent,) = Backdoor(boost=4.0, max_norm=1e3).replies(honest[1:2], frozenset({1}), Scene(1, 30))
    np.testing.assert_allclose(sent.update, 4 * honest[1].update)
    early = Backdoor(boost=4.0, from_round=3).replies(honest, frozenset({1}), Scene(1, 30))
    assert early[1] is honest[1]


def test_among_peers_the_local_step_is_boosted():
    own, starts = generator("o").normal(size=(2, 6)), generator("s").normal(size=(2, 6))
    facts = Facts(1, 2, (7, 8), (0, 1, 2, 3), states=True, starts=starts)
    sent = Backdoor().craft(np.zeros((4, 6)), own, facts)
    np.testing.assert_allclose(sent, starts + 3 * (own - starts))
    with pytest.raises(ShoalError, match="models before it"):
        Backdoor().craft(np.zeros((4, 6)), own, Facts(1, 2, (7, 8), (0, 1, 2, 3), states=True))
