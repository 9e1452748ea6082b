"""No library code draws from a global generator: every draw has a generator of its own, made from a key.

Ruff forbids some names; this walks the syntax trees, so that an alias or a draw without ``generator=`` is seen as well.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fl", "clients", "aggregators", "privacy")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))

# torch functions that draw; each takes ``generator=``.
DRAWS = {
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "rand_like", "randn_like",
    "randint_like", "binomial",
}  # fmt: skip
# Tensor methods that draw in place, and initialisers: they take ``generator=`` too.
IN_PLACE = {
    "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_",
    "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "orthogonal_",
    "sparse_",
}  # fmt: skip
SEEDS = {"manual_seed", "seed", "manual_seed_all", "seed_all", "set_rng_state", "get_rng_state", "initial_seed"}
NUMPY_ALLOWED = {"Generator", "PCG64", "SeedSequence", "Philox", "BitGenerator"}
# Other libraries' calls that seed everything there is.
SEED_ALL = {"set_seed", "seed_everything", "enable_full_determinism"}
# The one place that touches torch's global generator, to put it back.
ALLOWED = {("fl/keys.py", "torch.random.fork_rng"), ("fl/keys.py", "torch.random.default_generator.manual_seed")}


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of nested attributes; what is not a plain name is ``?``."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "?", *reversed(parts)])


def violations(source: str, file: str = "x.py") -> list[str]:
    """What draws from, seeds or imports a global generator in ``source``."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # local name -> what it stands for
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                (a.asname or a.name.split(".")[0]): (a.name if a.asname else a.name.split(".")[0]) for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}

    def full(node: ast.AST) -> str:
        first, _, rest = dotted(node).partition(".")
        return ".".join(filter(None, [names.get(first, first), rest]))

    for name in names.values():
        if name == "random" or name.startswith("random."):
            found.append(f"import {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = full(node)
            numpy = name.startswith("numpy.random.") and name.split(".")[2] not in NUMPY_ALLOWED
            torch = name.startswith("torch.") and name.split(".")[-1] in SEEDS | {"fork_rng"}
            if numpy or torch or name.rpartition(".")[2] in SEED_ALL:
                found.append(name)
        if isinstance(node, ast.Call):
            name, given = full(node.func), {k.arg for k in node.keywords}
            draws = name.startswith("torch.") and name.split(".")[-1] in DRAWS | IN_PLACE
            draws |= isinstance(node.func, ast.Attribute) and node.func.attr in IN_PLACE
            if draws and "generator" not in given:
                found.append(f"{name} without generator=")
    return [f"{file}: {name}" for name in dict.fromkeys(found) if (file, name) not in ALLOWED]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_library_code_uses_no_global_generator(path):
    assert violations(path.read_text(), path.relative_to(ROOT).as_posix()) == []


def test_the_whole_library_is_walked():
    assert len(FILES) > 60
    assert ROOT / "fl" / "keys.py" in FILES


FORBIDDEN = [
    "import random", "from random import shuffle", "import random as r", "import numpy as np\nnp.random.seed(1)",
    "import numpy\nnumpy.random.rand()", "from numpy.random import normal\nnormal()",
    "import numpy as np\nnp.random.default_rng()", "from numpy import random\nrandom.permutation(3)",
    "import torch\ntorch.rand(3)", "import torch as t\nt.randperm(3)", "from torch import randn\nrandn(3)",
    "import torch\ntorch.manual_seed(1)", "import torch\ntorch.random.manual_seed(1)",
    "import torch\ntorch.cuda.seed()",
    "import torch\nx.normal_()", "from torch import nn\nnn.init.normal_(x)", "import torch\nx[0].bernoulli_(0.5)",
    "import torch\ntorch.bernoulli(x, 0.5)", "from transformers import set_seed\nset_seed(1)",
    "import torch\nwith torch.random.fork_rng(): pass", "import torch\nf = torch.manual_seed",
]  # fmt: skip


@pytest.mark.parametrize("source", FORBIDDEN)
def test_what_is_forbidden_is_seen(source):
    assert violations(source)


FINE = [
    "import torch\ntorch.rand(3, generator=g)", "import torch\nx.normal_(generator=g)",
    "import numpy as np\nrng: np.random.Generator = np.random.Generator(np.random.PCG64(1))",
    "import torch\ntorch.Generator().manual_seed(1)", "rng.random(3)", "rng.normal()",
    "import torch\ntorch.normal(m, generator=g)",
    "import numpy as np\nnp.random.SeedSequence(3)",
]  # fmt: skip


@pytest.mark.parametrize("source", FINE)
def test_what_is_fine_passes(source):
    assert violations(source) == []
