"""`shoal server` and `shoal node` without a network: what they print is what they start, and what they refuse."""

import itertools
import json
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fl.cli import main
from fl.errors import ConfigError
from fl.hosts import programs
from fl.hosts.addresses import is_loopback, is_wildcard, join_address, split_address
from fl.hosts.arguments import add_commands
from fl.hosts.clients import parse_clients
from fl.hosts.keys import make_keys

ECHO = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
QUIET = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION")


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "keys"
    make_keys(folder, ["10.77.0.1", "server"], ["node-0"])
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(line: str) -> tuple[dict[str, str], list[str]]:
    """The environment and the words of a printed command."""
    words = shlex.split(line)
    count = next(i for i, word in enumerate(words) if word.startswith("/"))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def printed(capfd, *words: str) -> tuple[dict[str, str], list[str]]:
    assert main([*words, "--print"]) == 0
    return parsed(capfd.readouterr().out)


def refused(capfd, *words: str) -> str:
    """The one line with which a command ends."""
    assert main(list(words)) in (1, 2)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("shoal: ")
    return lines[0]


# Words


@pytest.mark.parametrize(
    ("spec", "clients"),
    [("0-7", range(8)), ("0,3,5", (0, 3, 5)), ("5, 0-1", (5, 0, 1)), ("4", (4,)), ("2-2", (2,))],
)
def test_client_lists(spec, clients):
    assert parse_clients(spec) == tuple(clients)


@pytest.mark.parametrize("spec", ["", "a", "3-1", "1,,2", "-1", "1-", "0-3,2", "1.5", "0-99999999", "٣"])
def test_malformed_client_lists(spec):
    with pytest.raises(ConfigError, match="--clients"):
        parse_clients(spec)


def test_addresses():
    assert split_address("x", "10.0.0.1:80") == ("10.0.0.1", 80)
    assert split_address("x", "[::1]:8000") == ("::1", 8000)
    assert join_address("::1", 8000) == "[::1]:8000" and join_address("a", 1) == "a:1"
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost")] == [True] * 4
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example.org", ""))
    assert is_wildcard("0.0.0.0") and is_wildcard("::") and not is_wildcard("127.0.0.1")
    for wrong in ("host", "host:", ":80", "host:0", "host:65536", "host:http", "::1:8000", "[::1]", "a:b:1"):
        with pytest.raises(ConfigError):
            split_address("x", wrong)


def test_a_shown_command_does_in_a_shell_what_a_program_does(here, capfd):
    command = [sys.executable, "-c", ECHO, "a b", "it's", "$HOME", "*"]
    settings = programs.settings_of(Path("a home"))
    with programs.Program(command, settings) as child:
        assert child.wait() == 0
    started = json.loads(capfd.readouterr().out)
    line = programs.shown(command, settings)
    typed = json.loads(subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=True).stdout)
    assert typed[0] == started[0]
    names = [*settings, *programs.paths()]  # a shell sets a few others for itself
    assert [typed[1][name] for name in names] == [started[1][name] for name in names]
    assert started[0] == ["a b", "it's", "$HOME", "*"]
    assert started[1]["FLWR_HOME"] == str(here / "a home")
    assert started[1]["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert started[1]["PYTHONPATH"].split(":")[0] == str(Path(__file__).parents[2])


# `shoal server`


def test_server_command(here, keys, capfd):
    settings, words = printed(capfd, "server", "--host", "10.77.0.1", "--port", "8111", "--keys", str(keys))
    assert Path(words[0]).name == "flower-superlink" and Path(words[0]).is_file()
    options = dict(itertools.pairwise(words))
    assert (options["--host"], options["--port"], options["--database"]) == ("10.77.0.1", "8111", "shoal-superlink.db")
    assert "--enable-supernode-auth" in words and "--disable-runtime-dependency-installation" in words
    assert "--insecure" not in words
    for option, name in (("certfile", "server.pem"), ("keyfile", "server.key"), ("ca-certfile", "ca.crt")):
        assert options[f"--ssl-{option}"] == str(keys / name)
    assert settings["FLWR_HOME"] == str(here / ".shoal" / "flwr")
    assert [settings[name] for name in QUIET] == ["0", "1", "1"]
    assert not (here / ".shoal").exists() and not (here / "shoal-superlink.db").exists()  # only printed


def test_server_in_memory_and_insecure(here, capfd):
    _, words = printed(capfd, "server", "--insecure", "--database", ":memory:")
    assert "--database" not in words and "--insecure" in words
    assert not any(word.startswith("--ssl") for word in words) and "--enable-supernode-auth" not in words


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "example.org"])
def test_server_refuses_to_be_insecure_off_loopback(here, keys, capfd, host):
    assert "loopback" in refused(capfd, "server", "--insecure", "--host", host)
    assert "loopback" in refused(capfd, "server", "--insecure", "--host", host, "--keys", str(keys))


def test_server_refusals(here, keys, capfd):
    assert "--keys" in refused(capfd, "server")
    assert "is for 10.77.0.1, server" in refused(capfd, "server", "--keys", str(keys), "--host", "10.77.0.2")
    assert "server.pem" in refused(capfd, "server", "--keys", str(here))
    assert "nope.pub" in refused(capfd, "server", "--keys", str(keys), "--allow", "nope.pub")
    own = here / "own"
    make_keys(own, ["10.77.0.1"], ["node-0"])
    (own / "server.key").chmod(0o644)
    assert "chmod 600" in refused(capfd, "server", "--keys", str(own))
    (own / "server.key").chmod(0o600)
    (own / "node-0.pub").unlink()
    assert "no *.pub file" in refused(capfd, "server", "--keys", str(own))
    (own / "node-0.pub").write_text("ssh-rsa AAAA")
    assert "node-0.pub is no public key" in refused(capfd, "server", "--keys", str(own))


def test_server_refuses_a_port_that_is_taken(here, keys, capfd):
    """What listens there would be taken for the SuperLink, and nodes' keys registered with it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert "nothing can listen on" in refused(capfd, "server", "--keys", str(keys), "--port", port)


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_server_ports(capfd, port):
    with pytest.raises(SystemExit) as ended:
        main(["server", "--port", port])
    assert ended.value.code == 2


# `shoal node`


def test_node_command(here, keys, capfd):
    (here / "a.jsonl").touch()
    words = ["node", "10.77.0.1:8000", "--keys", str(keys), "--name", "node-0", "--stock"]
    words += ["--clients", "2", "--data", "a.jsonl", "--device", "cuda", "--threads", "3"]
    settings, words = printed(capfd, *words)
    assert Path(words[0]).name == "flower-supernode" and Path(words[0]).is_file()
    options = dict(itertools.pairwise(words))
    assert options["--superlink"] == "10.77.0.1:8000"
    assert options["--root-certificates"] == str(keys / "ca.crt")
    assert options["--auth-supernode-private-key"] == str(keys / "node-0")
    assert "--insecure" not in words
    assert settings["FLWR_HOME"] == str(here / ".shoal" / "node-0" / "flwr")
    from flwr.common.config import parse_config_args

    assert parse_config_args([options["--node-config"]]) == {
        "state": str(here / ".shoal" / "node-0"),
        "clients": "2",
        "data": str(here / "a.jsonl"),
        "device": "cuda",
        "threads": 3,
        "files": str(here),
    }
    assert not (here / ".shoal").exists()


def test_a_stock_node_and_a_resident_one_are_the_same_place(here, keys, capfd, monkeypatch):
    from flwr.common.config import parse_config_args

    import fl.engine.resident
    from fl.engine.session import Place, Session

    (here / "a.jsonl").touch()
    (here / "b.jsonl").touch()
    words = ["node", "10.77.0.1:8000", "--keys", str(keys), "--name", "node-0", "--clients", "4,1"]
    words += ["--data", "a.jsonl", "b.jsonl", "--device", "cpu", "--threads", "2", "--state", "kept"]
    _, printed_words = printed(capfd, *words)
    seen = {}
    monkeypatch.setattr(Session, "app", lambda session: seen.setdefault("place", session.place))
    monkeypatch.setattr(fl.engine.resident, "serve_node", lambda to, app, **rest: seen.update(rest, to=to))
    assert main([*words, "--max-message-mb", "5"]) == 0
    assert seen["place"] == Place.of_node(parse_config_args([printed_words[-1]]))
    assert (seen["to"], seen["insecure"]) == ("10.77.0.1:8000", False)
    assert seen["root_certificates"] == (keys / "ca.crt").read_bytes()
    assert seen["key_file"] == keys / "node-0"
    assert seen["max_message_bytes"] == 5 * 2**20
    assert (here / "kept").stat().st_mode & 0o777 == 0o700


def test_node_refusals(here, keys, capfd):
    node = ["node", "10.77.0.1:8000", "--keys", str(keys), "--name", "node-0"]
    assert "--keys and --name" in refused(capfd, "node", "10.77.0.1:8000")
    assert "--keys and --name" in refused(capfd, "node", "10.77.0.1:8000", "--keys", str(keys))
    assert "loopback" in refused(capfd, "node", "10.77.0.1:8000", "--insecure")
    assert "HOST:PORT" in refused(capfd, "node", "10.77.0.1", "--keys", str(keys), "--name", "node-0")
    assert str(keys / "node-9") in refused(capfd, *node[:-1], "node-9")
    assert "--clients='0-'" in refused(capfd, *node, "--clients", "0-")
    assert "a.jsonl" in refused(capfd, *node, "--clients", "0", "--data", "a.jsonl")
    assert "one file for each client" in refused(capfd, *node, "--clients", "0,1", "--data", "a.jsonl")
    assert "one file for each client" in refused(capfd, *node, "--data", "a.jsonl")
    assert "--max-message-mb" in refused(capfd, *node, "--max-message-mb", "0")
    assert "--listen" in refused(capfd, *node, "--listen", "10.77.0.1")
    assert "stock" in refused(capfd, *node, "--listen", "10.77.0.1:7000", "--stock")
    assert "without quotes" in refused(capfd, *node, "--state", "a'b", "--stock")
    (here / "file").touch()
    assert "state folder" in refused(capfd, *node, "--state", "file/state")
    own = here / "own"
    make_keys(own, ["a"], ["node-0"])
    (own / "node-0").chmod(0o604)
    line = refused(capfd, "node", "a:1", "--keys", str(own), "--name", "node-0")
    assert "mode 604" in line and f"chmod 600 {own / 'node-0'}" in line
    (own / "ca.crt").unlink()
    assert str(own / "ca.crt") in refused(capfd, "node", "a:1", "--keys", str(own), "--name", "node-0")


# Children

CHILD = """
import os, signal, sys, time
def end(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    sys.exit(7)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, end)
print("up", os.getpid(), os.getpgid(0), flush=True)
time.sleep(60)
"""
PARENT = f"""
import sys
from fl.hosts.programs import Program
with Program([sys.executable, "-c", {CHILD!r}], {{}}) as child:
    sys.exit(child.wait())
"""


@pytest.fixture
def parent(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on_and_the_exit_code_comes_back(parent, number):
    word, child, group = parent.stdout.readline().split()
    assert word == "up" and child == group != str(parent.pid)  # a process group of its own
    parent.send_signal(number)
    assert parent.stdout.readline().split() == ["got", number.name]
    assert parent.wait(10) == 7


def test_a_child_that_a_signal_ends_counts_as_in_a_shell(here):
    with programs.Program([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {}) as child:
        assert child.wait() == 128 + 9


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent was killed")
def test_a_child_ends_when_its_parent_is_killed(parent):
    assert parent.stdout.readline().startswith("up")
    parent.kill()
    assert parent.stdout.readline().split() == ["got", "SIGTERM"]


def test_options_have_help():
    """Every option of the three commands says what it is."""
    import argparse

    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    add_commands(commands)
    for name, command in commands.choices.items():
        assert all(action.help for action in command._actions), name
