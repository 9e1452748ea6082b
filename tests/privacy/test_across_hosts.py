"""Guards of places that are apart: noise that the settings do not give away, and books that are never too low."""

import contextlib
import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from clients.behaviours.base import ReplyFields
from clients.local.training import LocalTraining
from fl.errors import ConfigError, ShoalError
from fl.messages import SecureRequest, TrainRequest
from fl.secure import KEYS, SecureClients, make_codecs
from fl.state import Update
from privacy.accounting import SampledGaussian
from privacy.base import BudgetSpent, Guard, noise_root
from privacy.central import Central
from privacy.distributed import Distributed
from privacy.dp_ftrl import DPFTRL
from privacy.example_level import charge
from privacy.ledger import Book
from privacy.local_dp import LocalDP
from privacy.none import NoPrivacy
from tests.fl.secure_rounds import FEW
from tests.fl.secure_rounds import SPACE as WIDE
from tests.privacy import test_distributed, test_dp_brem, test_dp_sgd, test_example_level
from tests.privacy.test_client_level import LAYOUT, guard_of, settings, space, state, update, vectors

SECRET, OTHER = b"a" * 32, b"b" * 32
EXAMPLES = np.arange(100)


# Noise


def job_of(guard: Guard) -> list[np.ndarray]:
    job = guard.job(0, 1, "content", EXAMPLES, {})
    name = np.frombuffer(repr(job.private.key).encode(), np.uint8)
    return [np.concatenate(job.batches), name]


def local(guard: Guard) -> list[np.ndarray]:
    guard.job(3, 1, "content", EXAMPLES, {})
    vector = np.linspace(-1, 1, LAYOUT.size)
    return [guard.release(ReplyFields(3, 1, 0, "", vector, 7, 5, 9, 2.5), np.arange(LAYOUT.size)).update]


def summed(guard: Guard) -> list[np.ndarray]:
    return [guard.collect(state(), [update(c, v) for c, v in enumerate(vectors(5))], 1, 0.1)[0].vector]


def adapted(guard: Guard) -> list[np.ndarray]:
    return [*summed(guard), np.array([guard.clip])]


def momenta(guard: Guard) -> list[np.ndarray]:
    [one] = guard.collect(state(), [Update(c, 1, 0, v, 5) for c, v in enumerate(vectors(3))], 1, 0.1)
    return [one.vector]


def masked(guard: Guard) -> list[np.ndarray]:
    """What a client encodes of its update, before masks, which are new in every process."""
    codecs, state = make_codecs(FEW, guard, WIDE, 6, 1), np.zeros(0, np.float32)
    clients = SecureClients(FEW, 0, codecs, False, guard.keyed("root"))
    seen: list[np.ndarray] = []

    class Participant:
        def advertise(self):
            return b""

        def mask(self, encoded, inbox):
            seen.append(encoded)
            return encoded.tobytes()

        def state(self):
            return {}

    clients._participant = lambda client, part: Participant()  # type: ignore[method-assign, assignment]
    session, nothing = np.zeros(16, np.uint8), np.zeros(0, np.uint8)
    clients.answer(SecureRequest(0, 1, 0, state, "", {"stage": KEYS}, {"message": nothing, "session": session}))
    request = TrainRequest(0, 1, 0, state, "", {}, {"inbox": np.zeros(1, np.uint8), "session": session})
    clients.mask(request, np.full(WIDE.layout.size, 0.01, np.float32), 5)
    return seen


MECHANISMS: dict[str, tuple[Callable[[], Guard], Callable[[Guard], list[np.ndarray]]]] = {
    "dp_sgd": (lambda: test_dp_sgd.guard(), job_of),
    "dp_brem at a client": (lambda: test_dp_brem.guard(sizes=[100, 100]), job_of),
    "dp_brem at the server": (lambda: test_dp_brem.guard(sizes=[100, 100]), momenta),
    "local": (lambda: guard_of(LocalDP(), settings()), local),
    "central": (lambda: guard_of(Central()), summed),
    "central, adaptive": (lambda: guard_of(Central(adaptive=True, count_noise=20.0)), adapted),
    "dp_ftrl": (lambda: guard_of(DPFTRL()), summed),
    "distributed": (lambda: test_distributed.guard_of(Distributed(epsilon=None, noise_multiplier=1.0)), masked),
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_secret_changes_every_draw_and_the_same_secret_none(name):
    """Without one, whoever has the settings draws the same."""
    make, draw = MECHANISMS[name]
    seen = []
    for secret in (None, None, SECRET, SECRET, OTHER):
        guard = make()
        if secret is not None:
            guard.own(secret)
        seen.append(draw(guard))
    for a, b in ((0, 1), (2, 3)):
        assert all(np.array_equal(x, y) for x, y in zip(seen[a], seen[b], strict=True))
    for a, b in ((0, 2), (2, 4)):
        assert not any(np.array_equal(x, y) for x, y in zip(seen[a], seen[b], strict=True))


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_statement_says_who_must_not_know_what(name):
    make, _ = MECHANISMS[name]
    before, after = make(), make()
    after.own(SECRET)
    assert "run's seed" in before.statement().noise and "run's seed" in before.statement().against
    place = "server" if name.startswith(("central", "dp_ftrl", "dp_brem")) else "node"
    for said in (after.statement().noise, after.statement().against):
        assert f"the {place}'s own secret" in said and "seed" not in said
    assert SECRET.hex() not in json.dumps(after.statement().as_plain()) and SECRET.decode() not in after.root


def test_a_guard_has_one_secret():
    guard = Guard()
    assert guard.keyed("root") == "root" and guard.keyed(7) == 7
    guard.own(SECRET)
    assert guard.keyed("root") != "root" and isinstance(guard.keyed(7), int) and guard.keyed(7) > 2**64
    assert guard.keyed(7) != guard.keyed(8) and guard.keyed("7") != guard.keyed("8")
    with pytest.raises(ShoalError, match="one secret"):
        guard.own(OTHER)


# Books


BOOKS: dict[str, tuple[Callable[[], Guard], int]] = {
    "dp_sgd": (lambda: test_dp_sgd.guard(sizes=(100, 100)), 2),
    "dp_brem": (lambda: test_dp_brem.guard(sizes=[100, 100]), 1),
    "local": (lambda: guard_of(LocalDP(), settings()), 1),
}


@pytest.mark.parametrize("name", BOOKS)
def test_a_request_that_is_sent_is_charged_as_it_is_where_it_arrives(name):
    make, steps = BOOKS[name]
    node, server, told = make(), make(), make()
    for round in (1, 2):
        for _ in range(2):  # a message that comes twice
            server.mirror(1, round, f"content {round}", 100)
        node.job(1, round, f"content {round}", EXAMPLES, {})
    assert node.client_state(1)["steps"] == server.client_state(1)["steps"] == 2 * steps
    assert server.epsilon == node.epsilon > 0 and server.client_state(0)["steps"] == 0
    kept = json.loads(json.dumps(node.client_state(1)))
    told.restore_client(1, kept)
    told.restore_client(0, {})  # nothing was kept yet
    assert told.client_state(1) == node.client_state(1) and told.client_state(0)["steps"] == 0
    assert told.epsilon == node.epsilon
    told.job(1, 2, "content 2", EXAMPLES, {})  # the same job again, in a process that has read the book
    assert told.client_state(1)["steps"] == 2 * steps
    with pytest.raises(ConfigError, match="budget was spent under"):
        told.restore_client(1, {**kept, "plan": "another"})


@pytest.mark.parametrize("kind", [Central, DPFTRL])
def test_books_that_the_server_keeps_are_not_kept_at_clients(kind):
    guard = guard_of(kind())
    before = guard.state()
    guard.mirror(0, 1, "content", 100)
    guard.restore_client(0, {})
    assert guard.client_state(0) == {} and guard.state() == before
    none = NoPrivacy().guard(settings(), [5] * 8, space())
    none.mirror(0, 1, "content", 100)
    assert none.client_state(0) == {}


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["send", "again", "arrive", "late", "lose", "restart"]), st.integers(0, 3), st.integers(0, 1)
    ),
    max_size=40,
)


@given(EVENTS, st.sampled_from([None, 5, 9]))
@example([("send", 0, 0), ("again", 0, 1), ("late", 0, 0), ("late", 1, 0), ("late", 0, 0)], None)  # a, b, and a again
@hypothesis_settings(max_examples=300, deadline=None)
def test_the_server_never_counts_less_than_a_client_has_spent(events, limit):
    """Requests are repeated with the same or other content, lost, overtaken and delivered twice; nodes start again."""

    def book() -> Book:
        return Book(SampledGaussian(1.0, 0.2, 1), 1e-3, "rdp", limit=limit)

    def guard(mine: Book) -> Guard:
        return test_example_level.Plain("root", LocalTraining(steps=2), [0.2], [mine])

    node, server, round, under_way = guard(book()), guard(book()), 0, []
    for what, place, content in events:
        if what in ("send", "again"):
            round += what == "send"
            request = (max(round, 1), f"content {content}")
            server.mirror(0, *request, 40)
            under_way.append(request)
        elif what == "restart":
            kept, node = node.client_state(0), guard(book())
            node.restore_client(0, kept)
        elif under_way:
            request = under_way[place % len(under_way)]
            if what in ("arrive", "lose"):
                under_way.remove(request)
            if what != "lose":  # "late": it will arrive once more
                with contextlib.suppress(BudgetSpent, ShoalError):
                    node.job(0, *request, np.arange(40), {})
        assert server.client_state(0)["steps"] >= node.client_state(0)["steps"]
        assert server.epsilon >= node.epsilon


def test_an_old_request_is_charged_up_to_the_limit_and_does_not_reopen_its_round():
    book = Book(SampledGaussian(1.0, 0.2, 1), 1e-3, "rdp", limit=5)
    for round in (3, 2, 1):
        charge(book, round, "content", 2)
    assert book.steps == 5 and book.newest["round"] == 3
    with pytest.raises(ShoalError, match="older"):
        book.grant(2, "content", 2)


def test_the_root_of_a_run_s_noise_is_not_what_a_secret_makes_of_another_run_s():
    made = [noise_root(settings(rounds=rounds)) for rounds in (4, 5)]
    keyed = []
    for root in made:
        guard = Guard()
        guard.root = root
        guard.own(SECRET)
        keyed.append(guard.root)
    assert len({*made, *keyed}) == 4
