"""What is done to Flower beyond its public API still does what it should, with the Flower that is installed."""

import flwr.supercore.logger
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from fl.engine.flower import ensure_identity, quick_record, quiet_flower


def test_the_identity_is_set_where_there_is_none(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError):
        Message(RecordDict(), 2, "train")
    ensure_identity(7)
    metadata = Message(RecordDict(), 2, "train").metadata
    assert (metadata.run_id, metadata.src_node_id) == (7, SUPERLINK_NODE_ID)
    ensure_identity(8)
    assert TaskIdentity.run_id == 7


def test_a_quick_record_is_what_flower_would_make():
    for kind, values in (
        (ConfigRecord, {"a": 1, "b": [True], "c": "x"}),
        (MetricRecord, {"a": 1.5}),
        (ArrayRecord, {"a": Array(np.zeros(2))}),
        (RecordDict, {"m": MetricRecord({"a": 1})}),
    ):
        quick, slow = quick_record(kind, values), kind(values)
        assert type(quick) is kind and quick == slow
        assert list(quick) == list(values)
        assert quick.object_id == slow.object_id
        quick["z"] = next(iter(values.values()))
        assert "z" not in values


def test_flower_logs_a_line_once(caplog):
    logger = flwr.supercore.logger.FLOWER_LOGGER
    logger.addHandler(flwr.supercore.logger.console_handler)
    quiet_flower()
    assert logger.handlers == []
    logger.info("hidden")
    logger.warning("shown")
    assert [r.message for r in caplog.records if r.name == "flwr"] == ["shown"]
