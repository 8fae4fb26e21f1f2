"""Inverse roots, eigenvectors and orthogonal factors, against their definitions."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stretto.optim import roots

SINGLE, DOUBLE = torch.float32, torch.float64
ITERATIVE = ["newton", "denman_beavers"]


def with_values(values: Tensor, count: int = 1, seed: int = 0) -> Tensor:
    """Symmetric matrices (count, n, n), float64, of random eigenvectors."""
    n = len(values)
    random = torch.randn(count, n, n, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    basis = torch.linalg.qr(random)[0]
    return (basis * values) @ basis.mT


def conditioned(n: int, condition: float = 1e4, count: int = 1, seed: int = 0) -> Tensor:
    return with_values(
        torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=DOUBLE), count, seed
    )


def residual(root: Tensor, matrix: Tensor, k: int) -> Tensor:
    """X^k A - I."""
    eye = torch.eye(len(root), dtype=DOUBLE)
    return torch.linalg.matrix_power(root.double(), k) @ matrix.double() - eye


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


class Broken:
    """torch.linalg.eigh that fails for matrices whose first entry is 0, in the dtypes given."""

    def __init__(self, *dtypes: torch.dtype, error: type[Exception] = torch.linalg.LinAlgError) -> None:
        self.eigh, self.dtypes, self.error = torch.linalg.eigh, dtypes, error

    def __call__(self, stack: Tensor) -> tuple[Tensor, Tensor]:
        if stack.dtype in self.dtypes and (stack[:, 0, 0] == 0).any():
            raise self.error("no convergence")
        return self.eigh(stack)


@pytest.mark.parametrize("n", [8, 64, 256, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize(
    ("solver", "k"),
    [(solver, k) for solver in ("eigh", "newton") for k in (2, 3, 4)]
    + [("denman_beavers", k) for k in (2, 4, 8)],
)
def test_inverse_root_is_one(solver: roots.Solver, k: int, dtype: torch.dtype, n: int) -> None:
    matrix = 7e-3 * conditioned(n).to(dtype)
    root, converged = roots.inverse_root(matrix, 1 / k, solver=solver)
    assert converged.all() and root.dtype == dtype
    assert torch.equal(root, root.mT) or solver == "eigh"
    torch.testing.assert_close(root, root.mT, rtol=1e-5, atol=0)
    rest = residual(root[0], matrix[0], k)
    if dtype == SINGLE:
        assert rest.norm() / n**0.5 <= 5e-3
    else:
        assert torch.linalg.matrix_norm(rest, 2) <= 1e-4


@pytest.mark.parametrize("solver", roots.SOLVERS)
@pytest.mark.parametrize("ridge", ["relative", "absolute"])
def test_ridge_is_added(solver: roots.Solver, ridge: roots.Ridge) -> None:
    values = torch.logspace(1, -2, 16, dtype=DOUBLE)
    matrix = with_values(values)
    root, converged = roots.inverse_root(matrix, 0.25, solver=solver, ridge=ridge, eps=0.01)
    added = 0.01 * (values.max() if ridge == "relative" else 1)
    assert converged.all()
    # iterative solvers know the largest eigenvalue from below
    rtol = 0.01 if solver in ITERATIVE and ridge == "relative" else 1e-6
    found = torch.linalg.eigvalsh(root[0])
    torch.testing.assert_close(found, (values + added) ** -0.25, rtol=rtol, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("solver", roots.SOLVERS)
def test_size_of_a_matrix_does_not_matter(solver: roots.Solver, scale: float) -> None:
    matrix = conditioned(16, 10.0).float()
    root, converged = roots.inverse_root(scale * matrix, 0.25, solver=solver)
    assert converged.all()
    expected = roots.inverse_root(matrix, 0.25)[0]
    torch.testing.assert_close(root * scale**0.25, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [12, 80])
@pytest.mark.parametrize("solver", roots.SOLVERS)
def test_stack_equals_its_matrices_and_one_that_is_not_finite_harms_none(
    solver: roots.Solver, n: int, two_threads: None
) -> None:
    easy, hard = conditioned(n, 10.0), conditioned(n, 1e4)
    stack = torch.cat([easy, torch.zeros(1, n, n), hard, torch.full((1, n, n), torch.nan), easy]).float()
    stack[4, 3, 3] = torch.inf
    found, converged = roots.inverse_root(stack, 0.25, solver=solver)
    assert converged.tolist() == [True, True, True, False, False]
    assert not found[1].any() and not found[3:].any()
    for matrix, root in zip(stack[:3], found):
        alone = roots.inverse_root(matrix[None], 0.25, solver=solver)[0][0]
        torch.testing.assert_close(root, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ITERATIVE)
def test_iteration_that_cannot_converge_says_so(solver: roots.Solver) -> None:
    stack = torch.stack([torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2)])
    root, converged = roots.inverse_root(stack, 0.5, solver=solver)
    assert converged.tolist() == [False, True] and not root[0].any()
    torch.testing.assert_close(root[1], torch.eye(2))


@pytest.mark.parametrize("n", [16, 256])
def test_norm_is_found_within_the_margin(n: int) -> None:
    spectra = [torch.logspace(0, -4, n), torch.linspace(1, 0.9, n), torch.eye(n)[0], torch.ones(n)]
    stack = torch.cat([with_values(values.double(), seed=seed) for seed, values in enumerate(spectra)])
    stack = torch.cat([stack, torch.diag_embed(torch.eye(n, dtype=DOUBLE)[[0, n // 2, n - 1]])])
    found = roots._largest(stack)
    assert (found > 0.7).all() and (found < 1 + 1e-9).all()


def test_inverse_root_says_what_a_solver_cannot_do() -> None:
    stack = torch.eye(2)[None]
    with pytest.raises(ValueError, match=r"'newton' needs 1 / power to be an integer; for power 0.3"):
        roots.inverse_root(stack, 0.3, solver="newton")
    with pytest.raises(ValueError, match=r"k is 3; Denman"):
        roots.inverse_root(stack, 1 / 3, solver="denman_beavers")
    with pytest.raises(ValueError, match=r"'newton' has no eigenvalues to leave out for ridge 'pinv'"):
        roots.inverse_root(stack, 0.5, solver="newton", ridge="pinv")
    with pytest.raises(ValueError, match=r"solver is 'svd'"):
        roots.inverse_root(stack, 0.5, solver="svd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ridge is 'none'"):
        roots.inverse_root(stack, 0.5, ridge="none")  # type: ignore[arg-type]


def test_eigenvalue_powers_by_hand() -> None:
    values = torch.tensor([[-1e-9, 0.0, 4.0], [0.0, 0.0, 0.0], [-2.0, -1.0, -1.0]])
    for eps, ridge, expected in [
        (0.0, "relative", [[0, 0, 0.5], [0, 0, 0], [0, 0, 0]]),
        (0.25, "relative", [[1, 1, 5**-0.5], [0, 0, 0], [0, 0, 0]]),
        (0.25, "absolute", [[2, 2, 4.25**-0.5], [2, 2, 2], [2, 2, 2]]),
        (0.25, "pinv", [[0, 0, 0.5], [0, 0, 0], [0, 0, 0]]),
    ]:
        found = roots.eigenvalue_powers(values, 0.5, ridge, eps)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("n", [64, 256])
def test_pseudo_inverse_is_a_root_on_the_range_and_annihilates_the_null_space(n: int) -> None:
    values = torch.logspace(0, -2, n, dtype=DOUBLE)
    values[n // 4 :] = -1e-8  # slightly negative, as rounding leaves them
    matrix = with_values(values).float()
    basis = torch.linalg.eigh(matrix.double())[1][0]
    null, rest = basis[:, : n - n // 4], basis[:, n - n // 4 :]
    root, converged = roots.inverse_root(matrix, 0.25, ridge="pinv")
    assert converged.all() and (root[0].double() @ null).norm() / n**0.5 < 1e-4
    inner = rest.T @ root[0].double() @ rest
    assert residual(inner, rest.T @ matrix[0].double() @ rest, 4).norm() / n**0.5 < 5e-3


def test_eigh_reads_the_lower_triangle() -> None:
    stack = conditioned(80, count=2)
    values, vectors, converged = roots.eigh(stack.tril() + torch.ones(80, 80, dtype=DOUBLE).triu(1))
    assert converged.all() and (values.diff() >= 0).all()
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, stack, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [8, 80])
def test_matrix_on_which_lapack_fails_is_tried_in_double(
    n: int, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    stack = conditioned(n, count=3).float()
    stack[1, 0, 0] = 0
    expected = torch.linalg.eigvalsh(stack)
    monkeypatch.setattr(torch.linalg, "eigh", Broken(SINGLE))
    values, _, converged = roots.eigh(stack)
    assert converged.all()
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(torch.linalg, "eigh", Broken(SINGLE, DOUBLE))
    values, vectors, converged = roots.eigh(stack)
    assert converged.tolist() == [True, False, True]
    assert not values[1].any() and torch.equal(vectors[1], torch.eye(n))
    torch.testing.assert_close(values[::2], expected[::2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_threads_are_as_before_also_after_an_error(
    count: int, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    stack = torch.zeros(count, 80, 80)
    roots.eigh(stack)
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(torch.linalg, "eigh", Broken(SINGLE, error=MemoryError))
    with pytest.raises(MemoryError):
        roots.eigh(stack)
    assert torch.get_num_threads() == 2


def test_empty_stacks() -> None:
    stack = torch.zeros(0, 80, 80)
    assert [len(part) for part in (*roots.eigh(stack), *roots.orthogonal_iteration(stack, stack))] == [0] * 6
    assert all(len(roots.inverse_root(stack, 0.5, solver=solver)[0]) == 0 for solver in roots.SOLVERS)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e9])
@pytest.mark.parametrize("rank", [80, 20])
@pytest.mark.parametrize("orthonormal", ["_orthonormal", "_orthonormal_batched"])
def test_orthogonal_iteration_never_moves_away(
    orthonormal: str, rank: int, condition: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the identity, on a rule for the CPU and one for CUDA; the values come near the eigenvalues."""
    monkeypatch.setattr(roots, "_orthonormal", getattr(roots, orthonormal))
    matrix = conditioned(80, condition)
    values, vectors = torch.linalg.eigh(matrix)
    values[:, : 80 - rank] = 0
    matrix = ((vectors * values[:, None]) @ vectors.mT).float()
    basis = torch.eye(80)[None]
    last = roots.off_diagonal(matrix, basis)
    for _ in range(30):
        found, basis, converged = roots.orthogonal_iteration(matrix, basis)
        now = roots.off_diagonal(matrix, basis)
        assert converged.all() and now < last + 1e-6
        torch.testing.assert_close(basis.mT @ basis, torch.eye(80)[None], rtol=0, atol=1e-4)
        last = now
    assert last < 0.03
    torch.testing.assert_close(found.sort()[0].double(), values, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_eigenvectors_are_a_fixed_point_of_orthogonal_iteration(dtype: torch.dtype) -> None:
    matrix = conditioned(80, count=2).to(dtype)
    values, vectors, _ = roots.eigh(matrix)
    found, basis, converged = roots.orthogonal_iteration(matrix, vectors)
    assert converged.all()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, values.flip(1), rtol=0, atol=20 * eps)
    assert (roots.off_diagonal(matrix, basis) < 20 * eps).all()


def test_diagonal_matrices_leave_a_permutation_as_it_is_bit_for_bit() -> None:
    matrix = torch.diag(torch.tensor([3.0, 0.0, 5.0, 1e-3]))[None]
    values, basis, _ = roots.orthogonal_iteration(matrix, torch.eye(4)[None])
    assert torch.equal(basis[0], torch.eye(4)[:, [2, 0, 3, 1]])
    torch.testing.assert_close(values, torch.tensor([[5.0, 3.0, 1e-3, 0.0]]), rtol=1e-6, atol=1e-9)
    assert torch.equal(roots.orthogonal_iteration(matrix, basis)[1], basis)


def test_orthogonal_iteration_sets_bases_kept_in_bfloat16_upright() -> None:
    matrix = conditioned(80, count=2).float()
    kept = roots.eigh(matrix)[1].bfloat16()
    values, basis, converged = roots.orthogonal_iteration(matrix, kept)
    assert converged.all() and basis.dtype == SINGLE
    torch.testing.assert_close(basis.mT @ basis, torch.eye(80).expand(2, -1, -1), rtol=0, atol=1e-5)
    assert (roots.off_diagonal(matrix, basis) < roots.off_diagonal(matrix, kept)).all()
    # the small eigenvalues too, though the Rayleigh quotients of what was kept are 20 times as large
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix).flip(1), rtol=0.02, atol=0)


@pytest.mark.parametrize("n", [12, 80])
def test_orthogonal_iteration_keeps_the_basis_of_what_is_not_finite_or_zero(
    n: int, two_threads: None
) -> None:
    stack = conditioned(n, count=3).float()
    basis = roots.eigh(stack)[1]
    stack[1, 2, 1], stack[2] = torch.nan, 0
    values, vectors, converged = roots.orthogonal_iteration(stack, basis)
    assert converged.tolist() == [True, False, True] and not values[1:].any()
    assert torch.equal(vectors[1], basis[1])
    torch.testing.assert_close(vectors[2], basis[2], rtol=0, atol=1e-5)
    alone = roots.orthogonal_iteration(stack[:1], basis[:1])
    torch.testing.assert_close(vectors[:1], alone[1], rtol=0, atol=1e-5)


def test_off_diagonal_is_that_of_the_rotated_matrix() -> None:
    stack, basis = conditioned(20, count=2), roots.eigh(conditioned(20, count=2, seed=1))[1]
    rotated = basis.mT @ stack @ basis
    rest = rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
    expected = rest.norm(dim=(1, 2)) / stack.norm(dim=(1, 2))
    torch.testing.assert_close(roots.off_diagonal(stack, basis), expected)
    assert not roots.off_diagonal(torch.zeros(1, 3, 3), torch.eye(3)[None]).any()


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize(
    ("coefficients", "iterations", "condition", "band"),
    [
        ("jordan", 5, 100.0, (0.65, 1.25)),
        ("polar", 5, 500.0, (0.85, 1.15)),
        ("polar", 8, 500.0, (0.99, 1.01)),
    ],
)
def test_singular_values_of_orthogonal_factors(
    coefficients: str, iterations: int, condition: float, band: tuple[float, float], tall: bool
) -> None:
    u, v = (torch.linalg.qr(torch.randn(n, 32, dtype=DOUBLE))[0] for n in (32, 48))
    matrix = (u * torch.logspace(0, -torch.tensor(condition).log10().item(), 32, dtype=DOUBLE)) @ v.T
    factor = roots.orthogonalize((matrix.T if tall else matrix)[None], iterations, coefficients)[0]
    sizes = torch.linalg.svdvals(factor)
    assert band[0] < sizes.min() and sizes.max() < band[1]


def test_orthogonalize_is_written_as_its_products() -> None:
    """Bit for bit on the CPU, where the two grams are one batched product each."""
    stack = torch.randn(2, 9, 20)
    x = stack / stack.flatten(1).norm(dim=1)[:, None, None]
    a, b, c = roots.QUINTIC
    for _ in range(3):
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    assert torch.equal(roots.orthogonalize(stack, 3), x)


@pytest.mark.parametrize("dtype", [torch.float16, SINGLE])  # triton's interpreter multiplies no bfloat16
@pytest.mark.parametrize("shape", [(2, 70, 33), (1, 200, 130), (3, 5, 64), (1, 64, 1)])
def test_half_tile_kernel(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In triton's interpreter, on shapes that tiles do not divide."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "stretto.optim.triton_gram", raising=False)
    from stretto.optim import triton_gram

    monkeypatch.setattr(triton_gram._half_tiles, "configs", triton_gram._half_tiles.configs[-1:])
    rtol = 1e-5 if dtype == SINGLE else 2e-3
    for x in (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype).mT):
        square = triton_gram.half_tile_gram(x)
        assert torch.equal(square, square.mT)
        torch.testing.assert_close(square.float(), x.float() @ x.float().mT, rtol=rtol, atol=1e-4)
        quadratic = triton_gram.half_tile_gram(square, square, beta=0.3, alpha=-0.5)
        assert torch.equal(quadratic, quadratic.mT)
        s = square.float()
        expected = 0.3 * s - 0.5 * s @ s
        assert (quadratic.float() - expected).norm() < rtol * expected.norm()
