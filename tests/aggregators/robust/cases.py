"""The rules with their slow twins, rows to try them on, and how they are called."""

import numpy as np
import torch

from aggregators import robust
from aggregators.robust import (
    CAF,
    MDA,
    NNA,
    Auto,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    MultiKrum,
    NoPre,
    TrimmedMean,
)
from fl.keys import generator
from tests.oracles import robust as naive

N, F, D = 15, 3, 23


def root(d: int = D) -> np.ndarray:
    return generator("robust", "root").normal(size=d)


def trusting(rows: np.ndarray, f: int, own: np.ndarray | None = None) -> np.ndarray:
    return naive.fltrust(rows, root(rows.shape[1]) if own is None else own)


RULES = {
    "mean": (Mean(), lambda rows, f: rows.mean(axis=0)),
    "auto": (Auto(), lambda rows, f: rows.mean(axis=0)),
    "krum": (Krum(), naive.krum),
    "multi_krum": (MultiKrum(), naive.multi_krum),
    "multi_krum, m = n - f": (MultiKrum(N - F), lambda rows, f: naive.multi_krum(rows, f, N - F)),
    "nna": (NNA(), naive.nna),
    "mda": (MDA(), naive.mda),
    "median": (CoordinateMedian(), lambda rows, f: naive.median(rows)),
    "trimmed_mean": (TrimmedMean(), naive.trimmed_mean),
    "meamed": (MeaMed(), naive.meamed),
    "bulyan": (Bulyan(), naive.bulyan),
    "geometric_median": (GeometricMedian(iterations=1000), lambda rows, f: naive.geometric_median(rows)),
    "clipping": (
        CenteredClipping(tau=2.0, iterations=3),
        lambda rows, f: naive.centered_clipping(rows, 2.0, 3, np.zeros(rows.shape[1])),
    ),
    "caf": (CAF(), naive.caf),
    "fltrust": (FLTrust(), trusting),
    "foolsgold": (FoolsGold(), lambda rows, f: naive.foolsgold(rows, rows)),
}
SHIFTS = [name for name in RULES if name not in ("clipping", "fltrust", "foolsgold", "nna")]


def case(*key, n=N, f=F, d=D) -> tuple[np.ndarray, np.ndarray]:
    draw = generator("robust", *key)
    return naive.attacked(n, f, d, draw, int(draw.integers(6)))


def outcome(rule, rows, f=F, pre=None, **more) -> np.ndarray:
    rows = torch.as_tensor(rows)
    if rule.root:
        more.setdefault("root", torch.from_numpy(root(rows.shape[1])))
    return robust.combine(rule, pre or NoPre(), f, rows, **more).vector.numpy()
