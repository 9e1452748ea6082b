"""Every reply is accepted or rejected with the right name, and nothing that a sender can do raises."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from fl.keys import generator
from fl.messages import BUDGET, EvaluateReply, EvaluateRequest, SecureRequest, TrainReply, TrainRequest
from fl.validation import Reason, Rejection, Validator

SIZE = 6
UPDATE = np.full(SIZE, 2.0, np.float32)  # norm sqrt(24) = 4.898979...


def validator(**changes) -> Validator:
    return Validator(**{"layout": "abc", "size": SIZE, "max_norm": 5.0, "max_weight": 100, **changes})


def request(client=3, round=7, version=6) -> TrainRequest:
    return TrainRequest(client, round, version, np.zeros(SIZE, np.float32), "abc")


def message(content=None, error=None) -> Message:
    metadata = Metadata(1, "r1", 1_000_003, 1, "c1", "7", 0.0, 60.0, "train")
    return make_message(metadata, error=error) if error else make_message(metadata, content=content)


def reply(**changes) -> Message:
    values = {"client": 3, "round": 7, "version": 6, "layout": "abc", "update": UPDATE}
    numbers = {"examples": 40, "steps": 5, "tokens": 900, "loss": 0.5}
    return message(TrainReply(**{**values, **numbers, **changes}).to_record())


def test_a_good_reply_is_decoded():
    got = validator().check(reply(), request())
    assert isinstance(got, TrainReply)
    assert (got.client, got.examples, got.loss) == (3, 40, 0.5)
    np.testing.assert_array_equal(got.update, UPDATE)


def with_(index, value):
    update = UPDATE.copy()
    update[index] = value
    return update


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (message(error=Error(2, "boom")), Reason.ERROR),
        (message(RecordDict()), Reason.SCHEMA),
        (reply(steps=-1), Reason.SCHEMA),
        (reply(tokens=-1), Reason.SCHEMA),
        (reply(client=4), Reason.UNEXPECTED),
        (reply(version=5), Reason.VERSION),
        (reply(version=7), Reason.VERSION),
        (reply(round=6), Reason.VERSION),
        (reply(layout="abd"), Reason.LAYOUT),
        (reply(update=np.zeros(SIZE - 1, np.float32)), Reason.SHAPE),
        (reply(update=np.zeros(SIZE + 1, np.float32)), Reason.SHAPE),
        (reply(update=with_(0, np.nan)), Reason.NOT_FINITE),
        (reply(update=with_(5, np.inf)), Reason.NOT_FINITE),
        (reply(update=with_(5, -np.inf)), Reason.NOT_FINITE),
        (reply(loss=float("nan")), Reason.NOT_FINITE),
        (reply(loss=float("inf")), Reason.NOT_FINITE),
        (reply(update=with_(0, 2.3)), Reason.TOO_LARGE),
        (reply(update=with_(0, 3.4e38)), Reason.TOO_LARGE),
        (reply(examples=0), Reason.WEIGHT),
        (reply(examples=-5), Reason.WEIGHT),
        (reply(examples=101), Reason.WEIGHT),
        (reply(examples=10**9), Reason.WEIGHT),
    ],
)
def test_a_bad_reply_is_named(bad, reason):
    got = validator().check(bad, request())
    assert isinstance(got, Rejection)
    assert got.reason is reason
    assert got.detail


def test_the_edges_are_allowed():
    for changes in ({"examples": 1}, {"examples": 100}, {"update": np.zeros(SIZE, np.float32)}, {"loss": 1e300}):
        assert isinstance(validator().check(reply(**changes), request()), TrainReply), changes
    exactly = np.array([3, 4, 0, 0, 0, 0], np.float32)
    assert isinstance(validator().check(reply(update=exactly), request()), TrainReply)


def test_without_a_bound_any_finite_norm_goes():
    huge = np.full(SIZE, 3e38, np.float32)
    assert isinstance(validator(max_norm=None).check(reply(update=huge), request()), TrainReply)


def test_nothing_is_accepted_that_nobody_asked_for():
    got = validator().check(reply(), None)
    assert isinstance(got, Rejection) and got.reason is Reason.UNEXPECTED


def test_a_job_is_answered_once():
    check = validator()
    assert isinstance(check.check(reply(), request()), TrainReply)
    again = check.check(reply(), request())
    assert isinstance(again, Rejection) and again.reason is Reason.DUPLICATE
    other = check.check(reply(client=4), request(client=4))
    later = check.check(reply(round=8), request(round=8))
    assert isinstance(other, TrainReply) and isinstance(later, TrainReply)


def test_a_bad_answer_is_an_answer_too():
    check = validator()
    check.check(message(error=Error(2, "boom")), request())
    again = check.check(reply(), request())
    assert isinstance(again, Rejection) and again.reason is Reason.DUPLICATE


def test_answers_of_finished_rounds_are_forgotten():
    check = validator()
    check.check(reply(), request())
    check.check(reply(round=8), request(round=8))
    check.forget(8)
    assert isinstance(check.check(reply(), request()), TrainReply)
    again = check.check(reply(round=8), request(round=8))
    assert isinstance(again, Rejection) and again.reason is Reason.DUPLICATE


def test_late_is_late_however_good():
    got = validator().check(reply(), request(), late=True)
    assert isinstance(got, Rejection) and got.reason is Reason.LATE


def evaluation(**changes) -> Message:
    values = {"client": 3, "round": 7, "version": 6, "examples": 20, "loss": 0.5}
    metrics = {"metrics": {"correct": 15, "each": [1, 2]}}
    return message(EvaluateReply(**{**values, **metrics, **changes}).to_record())


def test_evaluations_are_checked_too():
    asked = EvaluateRequest(3, 7, 6, np.zeros(SIZE, np.float32), "abc")

    def reason(bad):
        got = validator().check_evaluation(bad, asked)
        return got.reason if isinstance(got, Rejection) else None

    assert reason(evaluation()) is None
    assert reason(evaluation(examples=0)) is None
    assert reason(evaluation(examples=-1)) is Reason.WEIGHT
    assert reason(evaluation(examples=101)) is Reason.WEIGHT
    assert reason(evaluation(client=4)) is Reason.UNEXPECTED
    assert reason(evaluation(version=5)) is Reason.VERSION
    assert reason(evaluation(loss=float("nan"))) is Reason.NOT_FINITE
    assert reason(evaluation(metrics={"each": [1.0, float("inf")]})) is Reason.NOT_FINITE
    assert reason(evaluation(metrics={"n": 10**400})) is Reason.SCHEMA
    assert reason(reply()) is Reason.SCHEMA


def test_training_and_evaluating_in_one_round_are_two_jobs():
    check = validator()
    assert isinstance(check.check(reply(), request()), TrainReply)
    asked = EvaluateRequest(3, 7, 6, np.zeros(SIZE, np.float32), "abc")
    assert isinstance(check.check_evaluation(evaluation(), asked), EvaluateReply)


class Bomb:
    """Raises at whatever is done to it."""

    def __getattribute__(self, name):
        raise RuntimeError("boom")

    __eq__ = __hash__ = __len__ = __iter__ = __repr__ = __bool__ = None  # type: ignore[assignment]


def random_reply(rng: np.random.Generator) -> Message:
    """A good reply with a few of its parts replaced by anything at all, past the checks of Flower's records."""
    junk = [
        None, True, 0, -1, 2**63, 10**400, 0.0, -1.5, float("nan"), "", "train-reply", "\ud800", b"", b"\x80\x04K.",
        [], [1, 2], [None], {}, {"a": 1}, object(), Bomb(), np.float32(1), np.zeros(3),
        RecordDict(), ConfigRecord(), MetricRecord(),
        ArrayRecord(), ArrayRecord({"vector": Array("float32", (2,), "shoal.f32", b"12345678")}), Error(1, None),
    ]  # fmt: skip

    def anything():
        return junk[int(rng.integers(len(junk)))]

    bad = reply()
    record = bad.content
    targets = [record.__dict__["_data"], bad.__dict__]
    targets += [r.__dict__["_data"] for r in (record["state"], record["header"], record["metrics"])]
    targets += [record["state"]["vector"].__dict__, record["header"].__dict__]
    for _ in range(int(rng.integers(1, 4))):
        target = targets[int(rng.integers(len(targets)))]
        keys = [*target, "new"]
        key = keys[int(rng.integers(len(keys)))]
        if rng.random() < 0.15:
            target.pop(key, None)
        else:
            target[key] = anything()
    return bad


def test_whatever_comes_check_never_raises():
    rng = generator(0, "fuzz")
    seen = set()
    for _ in range(4000):
        bad = random_reply(rng)
        got = validator().check(bad, request())
        assert isinstance(got, TrainReply | Rejection)
        seen.add(got.reason if isinstance(got, Rejection) else "accepted")
        evaluated = validator().check_evaluation(bad, EvaluateRequest(3, 7, 6, UPDATE, "abc"))
        assert isinstance(evaluated, EvaluateReply | Rejection)
    assert {"accepted", Reason.SCHEMA, Reason.SHAPE, Reason.LAYOUT, Reason.ERROR, Reason.WEIGHT} <= seen


def test_random_bytes_for_a_vector_never_raise():
    rng = generator(1, "fuzz")
    for _ in range(500):
        data = rng.bytes(int(rng.integers(0, 64)))
        record = reply().content
        shape = (int(rng.integers(-2, 20)),) * int(rng.integers(0, 3))
        record["state"]["vector"] = Array("float32", shape, "shoal.f32", data)
        got = validator(size=len(data) // 4).check(message(record), request())
        if isinstance(got, TrainReply):
            assert got.update.tobytes() == data and np.isfinite(got.update).all()


def test_the_reasons_are_a_fixed_list():
    names = "unexpected duplicate late stale budget error schema version layout shape not_finite too_large weight proof"
    assert [reason.value for reason in Reason] == names.split()


# Named arrays, kept losses, spent budgets

MASKED = np.arange(4, dtype=np.uint32)
NOTHING = np.zeros(0, np.float32)


def masked(arrays=None, wanted=("uint32", 4), **changes):
    """What a validator says that expects the array ``masked`` in place of an update."""
    made = validator(size=0, arrays=lambda r: {"masked": wanted} if r.round == 7 else {})
    given = {"masked": MASKED} if arrays is None else arrays
    return made.check(reply(update=NOTHING, arrays=given, **changes), request())


def test_the_arrays_that_are_asked_for_are_accepted():
    assert isinstance(masked(), TrainReply)
    np.testing.assert_array_equal(masked().arrays["masked"], MASKED)
    assert isinstance(masked(wanted=("uint32", -1)), TrainReply)  # any length
    assert isinstance(masked({"masked": MASKED[:0]}, ("uint32", -1)), TrainReply)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({}, Reason.SCHEMA),
        ({"other": MASKED}, Reason.SCHEMA),
        ({"masked": MASKED, "other": MASKED}, Reason.SCHEMA),
        ({"masked": MASKED[:3]}, Reason.SHAPE),
        ({"masked": np.append(MASKED, MASKED)}, Reason.SHAPE),
        ({"masked": MASKED.astype(np.uint64)}, Reason.SHAPE),
        ({"masked": MASKED.astype(np.float32)}, Reason.SHAPE),
        ({"masked": np.arange(16, dtype=np.uint8)}, Reason.SHAPE),
    ],
)
def test_other_arrays_are_rejected(arrays, reason):
    assert masked(arrays).reason == reason


def test_arrays_that_nobody_asked_for_are_rejected():
    assert validator().check(reply(arrays={"masked": MASKED}), request()).reason == Reason.SCHEMA
    other = validator(size=0, arrays=lambda r: {"masked": ("uint32", 4)} if r.round != 7 else {})
    assert other.check(reply(update=NOTHING, arrays={"masked": MASKED}), request()).reason == Reason.SCHEMA


def test_an_update_in_the_clear_beside_a_masked_one_is_rejected():
    made = validator(size=0, arrays=lambda r: {"masked": ("uint32", 4)})
    assert made.check(reply(arrays={"masked": MASKED}), request()).reason == Reason.SHAPE


def test_a_loss_may_be_kept_secret_by_a_client():
    got = validator().check(reply(loss=None), request())
    assert isinstance(got, TrainReply) and got.loss is None


def test_a_client_whose_budget_is_spent_is_told_from_one_that_fails():
    got = validator().check(message(error=Error(2, f"{BUDGET}: epsilon 3 is reached")), request())
    assert got == Rejection(Reason.BUDGET, f"{BUDGET}: epsilon 3 is reached")
    assert validator().check(message(error=Error(2, f"no {BUDGET}")), request()).reason == Reason.ERROR
    assert validator().check(message(error=Error(2, f"{BUDGET}")), request(), late=True).reason == Reason.LATE


def test_a_stage_and_the_training_of_a_round_are_two_jobs():
    made = validator(size=0)
    stage = SecureRequest(3, 7, 6, NOTHING, "abc", {"stage": "keys"})
    assert isinstance(made.check(reply(update=NOTHING), stage), TrainReply)
    assert isinstance(made.check(reply(update=NOTHING), request()), TrainReply)
    assert made.check(reply(update=NOTHING), stage).reason == Reason.DUPLICATE
    made.forget(8)
    assert isinstance(made.check(reply(update=NOTHING), stage), TrainReply)
