"""Programs that don't keep to the rules: a node that answers with lies, a server app that sends nodes what it likes.

Each is the text of a script, since it runs in a process of its own. Both know everything: keys, formats, settings.
"""

# A node with a known key. It trains as it should; what it sends back is the next of LIES, a round each.
LIAR = """
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fl.engine.packing import pack, unpack
from fl.engine.resident import serve_node, until_signal
from fl.engine.session import Place, Session
from fl.messages import TrainReply

address, keys, name, clients, state = sys.argv[1:]
app = Session(Place(Path(state), tuple(int(c) for c in clients.split(",")))).app()
first = []


def told(change):
    def lie(content):
        header, contents = unpack(content)
        replies = [TrainReply.from_record(found) for found in contents]
        return pack([change(reply) for reply in replies], header, join=True)

    return lie


def bytes_for(reply):
    # its head says 10 numbers, and there are 4 bytes
    record = reply.to_record()
    record["state"] = ArrayRecord({"vector": Array("float32", (10,), "shoal.f32", bytes(4))})
    return record


def objects(reply):
    record = reply.to_record()
    array = np.array([print], dtype=object)
    record["state"] = ArrayRecord({"vector": Array("object", (1,), "numpy.ndarray", __import__("pickle").dumps(array))})
    return record


def shortened(content):
    cohort = content["cohort"]
    blob = cohort["blob"].data[:-7]
    arrays = {"index": cohort["index"], "blob": Array("uint8", (len(blob),), "shoal.bytes", blob)}
    return RecordDict({"cohort": ArrayRecord(arrays)})


LIES = [
    lambda content: content,  # the truth, once, to be repeated below
    told(bytes_for),  # shape
    told(objects),  # schema
    told(lambda r: replace(r, update=np.full_like(r.update, np.nan)).to_record()),  # not_finite
    told(lambda r: replace(r, client=0).to_record()),  # unexpected or version: another client's
    told(lambda r: replace(r, update=np.zeros(12_000_000, np.float32)).to_record()),  # shape; 48 MB each
    told(lambda r: replace(r, examples=10**12).to_record()),  # weight
    shortened,  # error: the lengths don't add up
    lambda content: RecordDict({"cohort": ConfigRecord({"no": "cohort"})}),  # error
    lambda content: pack(unpack(content)[1] * 2, {}, join=True),  # error: more contents than clients
    lambda content: first[0],  # version: a replay
]


def answer(message, context):
    reply = app(message, context)
    if message.metadata.message_type.startswith("train") and not reply.has_error():
        first.append(reply.content)
        lie = LIES[len(first) - 1] if len(first) <= len(LIES) else LIES[-1]
        return Message(lie(reply.content), reply_to=message)
    return reply


serve_node(
    address, answer, insecure=False, root_certificates=Path(keys, "ca.crt").read_bytes(), key_file=Path(keys, name),
    stop=until_signal(),
)
"""

# A run that sends each node one message of each kind and writes down what they answer.
EVIL_PROJECT = """
[project]
name = "evil"
version = "1.0.0"

[tool.flwr.app]
publisher = "nobody"

[tool.flwr.app.components]
serverapp = "evil.server_app:app"
clientapp = "evil.server_app:client"

[tool.flwr.app.config]
cfg = ""
folder = ""
words = ""
resume = false
"""
EVIL = """
import json
import pickle
import re
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

from fl.engine.carried import Note, carried, digest
from fl.engine.packing import pack
from fl.messages import TrainRequest

app = ServerApp()


def array(data):
    return Array("uint8", (len(data),), "shoal.bytes", data)


class Touch:
    # unpickled, it makes a file
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def contents(resolved, out, answers):
    note = Note("0" * 32, digest(resolved), 2, 6, ["a", "b"]).plain()
    header = {"clients": [0], "ids": ["c1"], "groups": [""], "join": True, "note": note}

    def request(client=0, layout="layout", state=None):
        made = TrainRequest(client, 1, 0, np.zeros(3, np.float32), layout, {"lr": 0.1}).to_record()
        if state is not None:
            made["state"] = ArrayRecord({"vector": state})
        return made

    def one(made, **changed):
        return pack([made], {**header, **changed}, join=True)

    whole = one(request())
    short = {"index": whole["cohort"]["index"], "blob": array(whole["cohort"]["blob"].data[:-3])}
    pickled = Array("object", (1,), "numpy.ndarray", pickle.dumps(np.array([Touch(out + ".canary")], dtype=object)))
    yield "too large", "train", RecordDict({"x": ConfigRecord({"b": bytes(3 * 2**20)})})
    yield "unknown type", "query.shell", RecordDict({"x": ConfigRecord({"a": 1})})
    yield "hello without note", "query.hello", RecordDict({"x": ConfigRecord({"a": 1})})
    yield "no cohort", "train", RecordDict({"x": ConfigRecord({"a": 1})})
    yield "no JSON", "train", RecordDict({"cohort": ArrayRecord({"index": array(b"{")})})
    yield "pickled index", "train", RecordDict({"cohort": ArrayRecord({"index": pickled})})
    yield "too short", "train", RecordDict({"cohort": ArrayRecord(short)})
    yield "more clients than contents", "train", pack([], header, join=True)
    yield "no note", "train", pack([request()], {k: v for k, v in header.items() if k != "note"}, join=True)
    yield "other version", "train", one(request(), note={**note, "protocol": 99})
    yield "other settings", "train", one(request(), note={**note, "digest": "0" * 32})
    yield "path as run", "train", one(request(), note={**note, "run": "../../x"})
    yield "other layout", "train", whole
    layout = re.search("has layout ([0-9a-f]+)", answers["other layout"][0])[1]
    yield "too few numbers", "train", one(request(layout=layout))
    yield "shape lies", "train", one(request(layout=layout, state=Array("float32", (10**9,), "shoal.f32", bytes(4))))
    yield "pickled state", "train", one(request(layout=layout, state=pickled))
    yield "client of another node", "train", one(request(5, layout), clients=[5])
    yield "client of nobody", "train", one(request(99, layout), clients=[99])


def said(reply):
    if reply.has_error():
        return reply.error.reason
    if "hello" in reply.content:
        return "hello: " + str(reply.content["hello"]["refused"])
    table = json.loads(reply.content["cohort"]["index"].data)["contents"]
    return "; ".join(entry["reason"] if isinstance(entry, dict) else "TRAINED" for entry in table)


@app.main()
def main(grid, context):
    resolved, out, _ = carried(context.run_config)
    answers = {}
    for name, kind, content in contents(resolved, out, answers):
        for node in sorted(grid.get_node_ids()):
            wanted = set(grid.push_messages([Message(content, node, kind, ttl=120)]))
            end = time.monotonic() + 60
            while wanted and time.monotonic() < end:
                for reply in grid.pull_messages(wanted):
                    wanted.clear()
                    answers.setdefault(name, []).append(said(reply))
                time.sleep(0.05)
    Path(out).write_text(json.dumps(answers))


client = None
"""
