"""Factorisations with fixed signs."""

from __future__ import annotations

import pytest
import torch

from clients.adapters.initial.factors import orthonormal, qr, signs, svd
from fl.keys import torch_generator


def matrix(*shape: int, key: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator("factors", key), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 10), (10, 7), (5, 5)], ids=str)
@pytest.mark.parametrize("key", range(3))
def test_svd_factors_the_matrix_and_each_left_vector_s_largest_entry_is_positive(shape, key):
    m = matrix(*shape, key=key)
    u, s, vh = svd(m)
    torch.testing.assert_close(u @ torch.diag(s) @ vh, m, rtol=0, atol=1e-13)
    assert (s.diff() <= 0).all() and u.shape == (shape[0], 5 if shape == (5, 5) else 7)
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_signs_do_not_depend_on_those_that_the_library_chose(monkeypatch):
    m, library = matrix(6, 9), torch.linalg.svd
    mine = svd(m)

    def flipped(a, full_matrices):
        u, s, vh = library(a, full_matrices=full_matrices)
        sign = torch.tensor([1, -1, -1, 1, -1, 1.0], dtype=a.dtype)
        return u * sign, s, vh * sign[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert all(torch.equal(a, b) for a, b in zip(svd(m), mine, strict=True))


def test_of_entries_that_are_equal_to_rounding_the_first_one_decides():
    """Which of them is the largest is up to rounding, that is, to the machine."""
    for noise in (1e-15, -1e-15):
        column = torch.tensor([[0.1], [-0.5 - noise], [0.5 + noise], [0.5]], dtype=torch.float64)
        assert signs(column).tolist() == [-1]


@pytest.mark.parametrize("shape", [(7, 10), (10, 7)], ids=str)
def test_qr_has_no_negative_diagonal(shape):
    m = matrix(*shape)
    q, r = qr(m)
    torch.testing.assert_close(q @ r, m, rtol=0, atol=1e-13)
    torch.testing.assert_close(q.T @ q, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-13)
    assert (r.diagonal() > 0).all() and torch.equal(r, r.triu())


def test_orthonormal_rows_of_any_direction():
    drawn = torch.stack([orthonormal(2, 3, torch_generator("rows", i)) for i in range(4000)])
    eye = torch.eye(2, dtype=torch.float64).expand(4000, 2, 2)
    torch.testing.assert_close(drawn @ drawn.mT, eye, rtol=0, atol=1e-13)
    # Uniform on the sphere: mean 0, second moment I/3, for either row.
    assert drawn.mean(0).abs().max() < 0.05
    second = (drawn[..., None] * drawn[..., None, :]).mean(0)
    assert (second - torch.eye(3) / 3).abs().max() < 0.03
