import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

from fl import environment

ROOT = Path(__file__).parents[2]


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_versions_name_what_decides_a_result():
    found = environment.versions()
    assert {"python", "torch", "flwr", "peft", "transformers", "shoal"} <= set(found)
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    monkeypatch.setitem(environment._PACKAGES, "ghost", "no-such-distribution")
    assert environment.versions()["ghost"] is None


def test_commit_of_a_clean_and_a_changed_tree(tmp_path):
    git(tmp_path, "init", "-q")
    assert environment.git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    (tmp_path / "untracked").write_text("x")
    clean = environment.git_commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert environment.git_commit(tmp_path) == clean + "+changes"


def test_no_commit_outside_git_or_without_git(tmp_path, monkeypatch):
    assert environment.git_commit(tmp_path / "missing") is None
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_commit(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert environment.git_commit(".") is None


def test_the_device_has_a_name():
    assert environment.device_name("cpu").endswith("cores)")
    assert not environment.device_name("cpu").startswith(" ")


PEAK = """
import numpy as np
from fl.environment import peak_memory_bytes
print(peak_memory_bytes())
block = np.ones(10_000_000)
print(peak_memory_bytes())
del block
print(peak_memory_bytes())
"""


def test_peak_memory_is_in_bytes_outlasts_the_block_and_is_this_process_own():
    ballast = np.ones(40_000_000)  # 320 MB in the parent must not show in the child
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True)
    before, during, after = map(int, done.stdout.split())
    assert 5e6 < before < 300e6
    assert before + 60e6 < during < before + 120e6
    assert after > during - 2e6  # the kernel counts pages in batches
    assert ballast.all()


def test_peak_memory_of_a_child_that_has_ended_counts():
    code = (
        "import subprocess, sys; from fl.environment import peak_memory_bytes;"
        "subprocess.run([sys.executable, '-c', 'b = bytearray(b\"x\") * 300_000_000']); print(peak_memory_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 300e6


def test_no_device_memory_without_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    assert environment.peak_device_memory_bytes() is None
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 123)
    assert environment.peak_device_memory_bytes() == 123
