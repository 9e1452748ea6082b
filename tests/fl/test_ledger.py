from fl.ledger import Ledger


def event(**more):
    return {
        "event": "round", "round": 1, "rejected": {}, "bytes_down": 10, "bytes_up": 7, "client_steps": 3, "tokens": 50,
        "loss": 0.5,
    } | more  # fmt: skip


def test_totals_grow_with_the_rounds():
    ledger = Ledger()
    first = ledger.record(event())
    second = ledger.record(event(round=2, bytes_up=1, client_steps=4, rejected={"late": 2, "error": 1}))
    assert (first["bytes_up_total"], first["bytes_down_total"], first["client_steps_total"]) == (7, 10, 3)
    assert (second["bytes_up_total"], second["bytes_down_total"], second["client_steps_total"]) == (8, 20, 7)
    ledger.record(event(round=3, rejected={"late": 1}))
    assert ledger.final() == {
        "bytes_up": 15, "bytes_down": 30, "client_steps": 10, "tokens": 150, "rejected_updates": 4,
        "rejected": {"error": 1, "late": 3},
    }  # fmt: skip


def test_a_totalled_event_keeps_its_values_and_order():
    first = Ledger().record(event())
    assert list(first) == [
        "event", "round", "rejected", "bytes_down", "bytes_up", "bytes_down_total", "bytes_up_total", "client_steps",
        "client_steps_total", "tokens", "loss",
    ]  # fmt: skip
    assert {k: v for k, v in first.items() if not k.endswith("_total")} == event()


def test_other_events_pass_unchanged():
    ledger = Ledger()
    other = {"event": "client", "bytes_up": 5}
    assert ledger.record(other) == other
    assert ledger.final()["bytes_up"] == 0


def test_a_restored_ledger_goes_on():
    whole, first = Ledger(), Ledger()
    for ledger in (whole, first):
        ledger.record(event(rejected={"late": 1}))
    state = first.state()
    first.record(event())  # what comes after does not change what was taken
    second = Ledger.restore(state)
    assert second.record(event(rejected={"late": 1})) == whole.record(event(rejected={"late": 1}))
    assert second.final() == whole.final()
    assert Ledger().final() == {
        "bytes_up": 0, "bytes_down": 0, "client_steps": 0, "tokens": 0, "rejected_updates": 0, "rejected": {},
    }  # fmt: skip
