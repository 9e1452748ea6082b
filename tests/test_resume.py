"""A run that is cut off anywhere goes on to the end that it would have had: the same bits in adapter and metrics."""

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from clients.local.training import LocalTraining
from fl import checkpoint, records, saving
from fl.cli import main
from fl.config import setting
from fl.errors import ConfigError, RunStopped, ShoalError
from fl.records import RunFolder, read_events, read_run, without_wall
from fl.run import resume
from fl.server_app import Server
from tests.helpers import SHARED, final, go, rounds, same_metrics, vector, weights

SHORT = ("clients.number=3", "clients.per_round=2", "local.steps=1", "network=lognormal")


@dataclass(frozen=True)
class Momentum(LocalTraining):
    """Clients that remember how far they went in their last job, and start with a share of that in the next one."""

    share: float = setting(0.5, ge=0)

    def fit(self, cohort, works, make_batch):
        moved = [w.memory.get("moved", np.zeros_like(w.start)) for w in works]
        starts = [replace(w, start=w.start + np.float32(self.share) * m) for w, m in zip(works, moved, strict=True)]
        fits = super().fit(cohort, starts, make_batch)
        for fit, work in zip(fits, works, strict=True):
            fit.memory = {"moved": fit.state - work.start, "jobs": work.memory.get("jobs", np.zeros(1, np.int64)) + 1}
        return fits


MOMENTUM = "local._target_=tests.test_resume.Momentum"


class Killer:
    """Counts the moments at which something was just, or is about to be, written, and kills the run at the k-th."""

    def __init__(self, patch: pytest.MonkeyPatch, k: int | None):
        self.count, self.k = 0, k
        append, rename, save = RunFolder.append, os.replace, saving.save_file

        def appending(folder, event):
            self.moment()
            if self.k == self.count + 1:  # a torn line
                folder._metrics.write(records.line(event)[:-9])
                folder._metrics.flush()
            self.moment()
            append(folder, event)

        def renaming(source, target):
            self.moment()
            rename(source, target)
            self.moment()

        def saving_probe(*arguments):
            self.moment()  # half an adapter
            save(*arguments)

        patch.setattr(RunFolder, "append", appending)
        patch.setattr(os, "replace", renaming)
        patch.setattr(saving, "save_file", saving_probe)

    def moment(self) -> None:
        self.count += 1
        if self.count == self.k:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at(k: int, folder: Path, *more: str) -> None:
    """Run in a child process that kills itself with SIGKILL at its k-th moment."""
    child = os.fork()
    if child == 0:
        try:
            Killer(pytest.MonkeyPatch(), k)
            go(folder, *more)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def moments(folder: Path, *more: str) -> int:
    """How many moments a whole run has; leaves the run in ``folder``."""
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch, None)
        go(folder, *more)
    return killer.count


def same_end(folder: Path, whole: Path) -> None:
    assert weights(folder) == weights(whole)
    assert same_metrics(folder, whole)
    mine, other = without_wall(read_run(folder)), without_wall(read_run(whole))
    assert mine == other
    assert mine["status"] == "completed"


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_and_resume_ends_the_same(tmp_path, every):
    total = moments(tmp_path / "whole", *SHORT)
    assert total > 35
    resumed = 0
    moments_tried = [*range(1, total, every), total]
    for k in moments_tried:
        folder = tmp_path / str(k)
        killed_at(k, folder, *SHORT)
        status = (read_run(folder) or {}).get("status")
        if not (folder / "config.yaml").is_file() or not (folder / "run.json").is_file():
            with pytest.raises(ShoalError, match=r"holds no run to resume.*anew"):
                resume(folder, shared=SHARED, quiet=True)
            go(folder, *SHORT)  # and that is possible
        elif status == "completed":
            assert k == total
            with pytest.raises(ShoalError, match="complete"):
                resume(folder, shared=SHARED, quiet=True)
        else:
            assert status == "interrupted"
            resume(folder, shared=SHARED, quiet=True)
            resumed += 1
        same_end(folder, tmp_path / "whole")
    assert resumed > 0.7 * len(moments_tried)


CASES = {
    "fedadam": ("server_optimizer=fedadam",),
    "fedavgm": ("server_optimizer=fedavgm",),
    "fedprox": ("local=fedprox", "local.mu=1", "local.steps=3"),
    "client memory": (MOMENTUM, "local.steps=2"),
    "what draws": ("network.dropout=0.3", "sampling=poisson", "partition=dirichlet", "adapter.dropout=0.2"),
    "seldom saved": ("checkpoint_every=3", "evaluation.every=2"),
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_a_run_remembers_is_resumed(tmp_path, case):
    more = (*SHORT, "schedule.rounds=4", *CASES[case])
    total = moments(tmp_path / "whole", *more)
    for k in (total // 2, 3 * total // 4):
        killed_at(k, tmp_path / str(k), *more)
        resume(tmp_path / str(k), shared=SHARED, quiet=True)
        same_end(tmp_path / str(k), tmp_path / "whole")


def test_the_cases_above_remember_something(tmp_path):
    """Else they would show nothing: each changes the adapter, and optimiser state and memories are in checkpoints."""
    go(tmp_path / "plain", *SHORT, "schedule.rounds=4", "local.steps=2")
    for case, name in (("fedadam", "server/optimizer/"), ("client memory", "memory/")):
        go(tmp_path / case, *SHORT, "schedule.rounds=4", "local.steps=2", *CASES[case])
        arrays, _ = checkpoint.load(tmp_path / case / "checkpoint")
        assert any(array.any() for path, array in arrays.items() if path.startswith(name))
        assert np.abs(vector(tmp_path / case) - vector(tmp_path / "plain")).max() > 1e-4
    jobs = {path.split("/")[1]: a[0] for path, a in arrays.items() if path.endswith("after/jobs")}
    assert sum(jobs.values()) == 8


def test_killed_twice(tmp_path):
    total = moments(tmp_path / "whole", *SHORT)
    killed_at(total // 3, tmp_path / "run", *SHORT)
    child = os.fork()
    if child == 0:
        try:
            Killer(pytest.MonkeyPatch(), total // 3)
            resume(tmp_path / "run", shared=SHARED, quiet=True)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert read_run(tmp_path / "run")["status"] == "interrupted"
    resume(tmp_path / "run", shared=SHARED, quiet=True)
    same_end(tmp_path / "run", tmp_path / "whole")


def test_a_run_says_that_it_was_interrupted_from_its_first_moment(tmp_path):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        append = RunFolder.append

        def watching(folder, event):
            seen.append(read_run(folder.path)["status"])
            append(folder, event)

        patch.setattr(RunFolder, "append", watching)
        go(tmp_path / "run")
    assert set(seen) == {"interrupted"}
    assert read_run(tmp_path / "run")["status"] == "completed"


# Ctrl-C


def interrupt(folder: Path, round: int, *more: str) -> KeyboardInterrupt:
    """Run until Ctrl-C comes when the first client of ``round`` is written down."""
    append = RunFolder.append

    def appending(run_folder, event):
        if event["event"] == "client" and event["round"] == round:
            raise KeyboardInterrupt
        append(run_folder, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append", appending)
        with pytest.raises(KeyboardInterrupt) as raised:
            go(folder, *more)
    return raised.value


@pytest.mark.parametrize("every", [1, 9])
def test_ctrl_c_checkpoints_and_resumes(tmp_path, every):
    more = (*SHORT, "schedule.rounds=4", f"checkpoint_every={every}")
    go(tmp_path / "whole", *more)
    folder = tmp_path / "run"
    error = interrupt(folder, 3, *more)
    assert error.__notes__ == [f"go on with `shoal run --resume {folder}`"]
    run = read_run(folder)
    assert run["status"] == "interrupted"
    assert run["finished"] is not None
    assert run["final"]["rounds"] == 2
    _, meta = checkpoint.load(folder / "checkpoint")
    assert meta["server"]["round"] == 2  # not the last one that was due, but the last one that was finished
    resume(folder, shared=SHARED, quiet=True)
    same_end(folder, tmp_path / "whole")


def test_the_command_says_how_to_go_on_after_ctrl_c(tmp_path, capfd, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "run", interrupted)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        from tests.helpers import ENCODER

        assert main(["run", "--quiet", *ENCODER, f"hydra.run.dir={tmp_path / 'run'}"]) == 130
    out, err = capfd.readouterr()
    assert err.splitlines()[-1] == f"shoal: interrupted; go on with `shoal run --resume {tmp_path / 'run'}`."
    assert out == ""


# What can't be resumed


@pytest.fixture
def cut_off(tmp_path) -> Path:
    """A run that was interrupted in its second round."""
    go(tmp_path / "whole", *SHORT)
    interrupt(tmp_path / "run", 2, *SHORT)
    return tmp_path / "run"


def test_a_finished_run_is_left_alone(tmp_path, capfd):
    go(tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert main(["run", "--resume", str(tmp_path / "run")]) == 1
    assert capfd.readouterr().err == f"shoal: The run in {tmp_path / 'run'} is complete; there is nothing to resume.\n"
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("place", ["missing", "empty", "file"])
def test_a_folder_without_a_run_is_refused(tmp_path, capfd, place):
    folder = tmp_path / place
    if place == "empty":
        folder.mkdir()
    elif place == "file":
        folder.write_text("")
    assert main(["run", "--resume", str(folder)]) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"shoal: {folder} holds no run to resume")
    assert error.count("\n") == 1


def test_settings_cannot_be_given_with_resume(cut_off, capfd):
    assert main(["run", "--resume", str(cut_off), "local.lr=1"]) == 2
    assert "a resumed run keeps its settings" in capfd.readouterr().err


def test_a_torn_last_line_is_cut_off(cut_off, tmp_path):
    with open(cut_off / "metrics.jsonl", "ab") as file:
        file.write(b'{"event":"client","rou')
    assert read_events(cut_off)
    resume(cut_off, shared=SHARED, quiet=True)
    same_end(cut_off, tmp_path / "whole")


def test_lines_that_are_missing_are_not_made_up(cut_off):
    (cut_off / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(ShoalError, match="lines are missing"):
        resume(cut_off, shared=SHARED, quiet=True)


def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(cut_off):
    path = cut_off / "checkpoint" / checkpoint.FILE
    good = path.read_bytes()
    path.write_bytes(good[:-40] + bytes(40))
    before, lines = read_run(cut_off), (cut_off / "metrics.jsonl").read_bytes()
    with pytest.raises(ShoalError, match=r"is damaged: .*delete the folder"):
        resume(cut_off, shared=SHARED, quiet=True)
    run = read_run(cut_off)
    assert run["status"] == "failed"
    assert "damaged" in run["error"]
    assert (run["final"], run["started"], run["num_clients"]) == (before["final"], before["started"], 3)
    assert (cut_off / "metrics.jsonl").read_bytes() == lines
    path.write_bytes(good)
    done = resume(cut_off, shared=SHARED, quiet=True)
    assert done.run["status"] == "completed"
    assert done.run["error"] is None


def test_a_checkpoint_of_another_adapter_is_refused(cut_off):
    change(cut_off, lambda config: config["adapter"].update(rank=3))
    with pytest.raises(ConfigError, match="the checkpoint belongs to another model or adapter"):
        resume(cut_off, shared=SHARED, quiet=True)


def test_a_checkpoint_of_another_kind_is_refused(cut_off):
    checkpoint.save(cut_off / "checkpoint", {}, {"kind": "something else"})
    with pytest.raises(ShoalError, match="of another kind"):
        resume(cut_off, shared=SHARED, quiet=True)


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [1\n", b"\xff\xfe\xff"])
def test_a_damaged_config_is_one_line(cut_off, text):
    (cut_off / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ShoalError, match=r"config\.yaml is damaged") as raised:
        resume(cut_off, shared=SHARED, quiet=True)
    assert "\n" not in str(raised.value)


def change(folder: Path, edit) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    edit(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


# A run that stopped


def test_a_stopped_run_goes_on_with_what_was_changed_in_its_config(tmp_path):
    """All clients fail from round 2 on. A checkpoint is due every 5 rounds; that of round 1 is there all the same."""
    folder = tmp_path / "run"
    faulty = ("attack=faulty", "attack.fraction=1", "attack.from_round=2", "schedule.rounds=3", "checkpoint_every=5")
    with pytest.raises(RunStopped, match=r"Round 2 has 0 accepted updates of 4 .*not_finite.*: 4"):
        go(folder, *faulty)
    run = read_run(folder)
    assert run["status"] == "failed"
    assert run["error"].startswith("Round 2 has 0 accepted updates")
    assert run["final"]["rounds"] == 1
    with pytest.raises(RunStopped, match="Round 2 has 0"):  # unchanged, it stops at the same place
        resume(folder, shared=SHARED, quiet=True)
    change(folder, lambda config: config.update(attack={"_target_": "clients.behaviours.none.Honest"}))
    done = resume(folder, shared=SHARED, quiet=True)
    assert done.run["status"] == "completed"
    assert [e["round"] for e in rounds(folder)] == [1, 2, 3]
    assert final(folder)["rejected"] == {}
    go(tmp_path / "honest", "schedule.rounds=3", "checkpoint_every=5")
    assert same_metrics(folder, tmp_path / "honest")
    assert weights(folder) == weights(tmp_path / "honest")
