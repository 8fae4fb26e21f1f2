"""Inverse roots and orthogonal factors of stacks of matrices.

Solvers take a stack (K, n, n) of symmetric positive semidefinite matrices, float32 or float64, and return
with each result a mask (K,) of those that converged: nothing raises, and on CUDA nothing loops over matrices or
looks at a result on the host (torch.linalg.eigh alone does, at its error codes). On the CPU matrices are solved
side by side, each on one thread.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

Solver = Literal["eigh", "newton", "denman_beavers"]
Results = TypeVar("Results", bound=tuple[Tensor, ...])
Ridge = Literal["relative", "absolute", "pinv"]
SOLVERS: tuple[Solver, ...] = ("eigh", "newton", "denman_beavers")
RIDGES: tuple[Ridge, ...] = ("relative", "absolute", "pinv")

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan 2024: singular values end in about [0.7, 1.2]
# Amsel et al. 2025 (Polar Express), arXiv:2505.16932: the best polynomial for what each iteration finds, for
# singular values down to 1e-3 of the norm.
POLAR = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # rounding may lift singular values above 1, where the polynomials grow fast
COEFFICIENTS = {  # (a, b, c) of a x + b x³ + c x⁵ for each iteration; the last is repeated
    "jordan": (QUINTIC,),
    "polar": (*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR[:-1]), POLAR[-1]),
}

SMALL = 64  # up to this size threads cost more than they give
SINE = 0.1  # a column at less of an angle to those before it is for Householder
SHIFT = 32  # in units of eps ||A||: above the rounding of a product, below what a root can tell from 0
MARGIN = 1.1  # power iteration finds 70 to 100 % of the norm; the iterations bear 50 %
NEAR = 0.1  # from here on convergence is quadratic, and what gets no nearer is at the limit of rounding
MOST = 40  # iterations: enough for condition 1e9 and more
TRITON = importlib.util.find_spec("triton") is not None


def orthogonalize(
    stack: Tensor, iterations: int = 5, coefficients: str = "jordan", spare: Tensor | None = None
) -> Tensor:
    """Push all singular values towards 1 by a quintic iteration.

    stack (B, m, n) -> (B, m, n), in the dtype given; 2 * iterations * k² (2 l + k) FLOPs a matrix with
    k = min(m, n) and l = max(m, n). Zero matrices stay zero. coefficients: "jordan" keeps one polynomial, and
    singular values end around 1 (Jordan et al. 2024, Muon); "polar" changes it, and they converge to 1. With a
    spare like the stack, both contiguous, they are overwritten and no other stack is made.
    """
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    sizes = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-20)
    x = x / sizes if spare is None else x.div_(sizes)
    other = None if spare is None else (spare.mT if tall else spare)
    if spare is not None and tall and stack.dtype == torch.bfloat16:
        # products into a transpose crawl on a CPU
        x, other = spare.view(x.shape).copy_(x), stack.view(x.shape)
    polynomials = COEFFICIENTS[coefficients]
    for i in range(iterations):
        a, b, c = polynomials[min(i, len(polynomials) - 1)]
        product = _quadratic(gram(x), b, c)
        if other is None:
            x = torch.baddbmm(x, product, x, beta=a)
        else:
            x, other = torch.baddbmm(x, product, x, beta=a, out=other), x
    return x.mT if tall else x


def gram(x: Tensor) -> Tensor:
    """x xᵀ: (K, m, n) -> (K, m, m), sums in float32 or better; half the products on CUDA with triton."""
    if _has_half_tiles(x):
        from stretto.optim.triton_gram import half_tile_gram

        return half_tile_gram(x)
    return torch.bmm(x, x.mT)


def _quadratic(square: Tensor, b: float, c: float) -> Tensor:
    """b S + c S² of symmetric S."""
    if _has_half_tiles(square):
        from stretto.optim.triton_gram import half_tile_gram

        return half_tile_gram(square, square, beta=b, alpha=c)
    return torch.baddbmm(square, square, square, beta=b, alpha=c)


def _has_half_tiles(x: Tensor) -> bool:
    """Whether tensor cores take these numbers; products of float32 at full precision are cuBLAS's."""
    if not (TRITON and x.is_cuda):
        return False
    if x.dtype == torch.float32:
        return torch.get_float32_matmul_precision() != "highest"
    return x.dtype in (torch.bfloat16, torch.float16)


def inverse_root(
    stack: Tensor, power: float, *, solver: Solver = "eigh", ridge: Ridge = "relative", eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(A + ridge)^-power: (K, n, n) -> roots (K, n, n), symmetric, 0 where not converged, and converged (K,).

    ridge as in `eigenvalue_powers`; zero matrices without an absolute ridge give zero roots. eigh takes any
    power and is exact, for about 10 n³ FLOPs at the speed of LAPACK and 4 n³ of products; newton needs 1 / power
    to be an integer, denman_beavers a power of 2, for 100 to 200 n³ of products. Raises ValueError for what
    a solver cannot do.
    """
    if ridge not in RIDGES:
        raise ValueError(f"ridge is {ridge!r}; it must be one of {', '.join(RIDGES)}")
    if solver == "eigh":
        values, vectors, converged = eigh(stack)
        # (V √p)(V √p)ᵀ is symmetric, and a gram
        roots = gram(vectors * eigenvalue_powers(values, power, ridge, eps).sqrt()[:, None, :])
        return roots, converged
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; it must be one of {', '.join(SOLVERS)}")
    if ridge == "pinv":
        raise ValueError(f"solver {solver!r} has no eigenvalues to leave out for ridge 'pinv'; use 'eigh'")
    k = round(1 / power)
    if abs(k * power - 1) > 1e-6:
        raise ValueError(f"solver {solver!r} needs 1 / power to be an integer; for power {power} use 'eigh'")
    if eps:
        added = eps * _largest(stack) if ridge == "relative" else stack.new_full((len(stack),), eps)
        stack = stack + added[:, None, None] * _identity(stack)
    return coupled_newton(stack, k) if solver == "newton" else denman_beavers(stack, k)


def eigenvalue_powers(values: Tensor, power: float, ridge: Ridge, eps: float) -> Tensor:
    """values^-power, regularised: (K, n) -> (K, n), 0 where what is raised to the power is not positive.

    ridge: "relative" adds eps times the largest value, "absolute" adds eps, both after negative values became
    0; "pinv" keeps what is above n times the machine's eps times the largest, and gives 0 for the rest.
    """
    largest = values.amax(-1, keepdim=True)
    if ridge == "pinv":
        base = torch.where(values > values.shape[-1] * torch.finfo(values.dtype).eps * largest, values, 0.0)
    else:
        base = values.clamp(min=0) + (eps * largest.clamp(min=0) if ridge == "relative" else eps)
    return torch.where(base > 0, base.pow(-power), 0.0)


def eigh(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (K, n), ascending, eigenvectors (K, n, n) in columns, converged (K,).

    Reads the lower triangle; the upper one only has to be finite. A matrix that fails is tried again in
    float64; where that fails too, and where an entry is not finite, the values are 0 and the vectors the
    identity.
    """
    values, rows, converged = _each(_eigh, stack)
    return values, rows.mT, converged


def _eigh(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `eigh`, with eigenvectors in rows, as LAPACK leaves them in memory."""
    finite = _size(stack)[:, 0, 0].isfinite()
    values, vectors = _lapack(_where(finite, stack, _identity(stack)))
    converged = finite & values.isfinite().all(1)
    values = torch.where(converged[:, None], values, 0.0)
    return values, _where(converged, vectors.mT, _identity(stack)), converged


def _lapack(stack: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh; what fails alone, and in float64 too, gets values of NaN."""
    for dtype in (stack.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(stack.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        if values.isfinite().all():
            return values.to(stack.dtype), vectors.to(stack.dtype)
    if len(stack) == 1:
        return torch.full_like(stack[..., 0], torch.nan), torch.zeros_like(stack)
    values, vectors = zip(*map(_lapack, stack.split(1)))
    return torch.cat(values), torch.cat(vectors)


def orthogonal_iteration(stack: Tensor, bases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step towards the eigenvectors: the orthogonal factor of A Q, columns by descending Rayleigh quotient.

    stack (K, n, n), bases (K, n, n) in any floating dtype -> values (K, n), the eigenvalues to first order in
    the angles left; vectors (K, n, n), orthonormal; converged (K,), False where an entry is not finite: then the
    values are 0 and the vectors those given. About 6 n³ FLOPs. The off-diagonal part of QᵀAQ never rises, and
    eigenvectors are a fixed point.
    """
    return _each(_orthogonal_iteration, stack, bases.to(stack.dtype))


def _orthogonal_iteration(stack: Tensor, bases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = _size(stack)
    columns = torch.bmm(stack, bases).div_(
        _positive(size)
    )  # in place: fresh memory costs the CPU more than the sums
    quotients = (bases * columns).sum(1)
    # A + shift has A's eigenvectors; columns of A's null space, else rounding alone, stay where they are
    shift = SHIFT * torch.finfo(stack.dtype).eps * quotients.amax(1).clamp(min=1)
    columns.addcmul_(bases, shift[:, None, None])
    order = quotients.argsort(dim=1, descending=True, stable=True)
    columns = columns.gather(2, order[:, None, :].expand_as(columns))
    norms = columns.norm(dim=1)
    columns.div_(norms[:, None, :])
    vectors, sines = _orthonormal_batched(columns) if stack.is_cuda else _orthonormal(columns)
    values = (norms * sines - shift[:, None]) * size[:, 0]
    converged = values.isfinite().all(1)
    return torch.where(converged[:, None], values, 0.0), _where(converged, vectors, bases), converged


def _orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Q (K, n, n) and the diagonal of R (K, n), >= 0, of unit columns; Householder's where Cholesky's is poor."""
    vectors, sines = _cholesky_qr(columns)
    poor = ~(sines > SINE).all(1)
    if poor.any():
        q, r = torch.linalg.qr(columns[poor])
        diagonal = r.diagonal(dim1=1, dim2=2)
        vectors[poor] = q * torch.where(diagonal < 0, -1.0, 1.0)[:, None, :]
        sines[poor] = diagonal.abs()
    return vectors, sines


def _orthonormal_batched(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The same without a look at the outcome: shifted Cholesky-QR. Fukaya et al. 2020, arXiv:1809.11085.

    A shift lets the factor exist at any condition, and lowers that to the shift's root; the second brings it to
    about 30 at float32's limit, and the two without shift to 1.
    """
    vectors, sines = columns, torch.ones_like(columns[:, 0])
    shift = 4 * columns.shape[-1] * torch.finfo(columns.dtype).eps
    for added in (shift, shift, 0.0, 0.0):
        vectors, more = _cholesky_qr(vectors, added)
        sines = sines * more
    return vectors, sines


def _cholesky_qr(columns: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Q and the diagonal of R by R = chol(XᵀX + shift)ᵀ; NaN where that is not positive definite."""
    square = gram(columns.mT)
    square.diagonal(dim1=1, dim2=2).add_(shift)
    factor, info = torch.linalg.cholesky_ex(square)
    vectors = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
    sines = torch.where((info == 0)[:, None], factor.diagonal(dim1=1, dim2=2), torch.nan)
    return vectors, sines


def off_diagonal(stack: Tensor, bases: Tensor) -> Tensor:
    """||QᵀAQ - its diagonal||_F / ||A||_F: (K, n, n), (K, n, n) -> (K,), for 2 n³ FLOPs; 0 for zero matrices."""
    bases = bases.to(stack.dtype)
    scaled = stack / _positive(_size(stack))
    columns = torch.bmm(scaled, bases)
    # ||QᵀAQ - D|| = ||AQ - QD||, which saves a product
    rest = torch.addcmul(columns, bases, (bases * columns).sum(1, keepdim=True), value=-1)
    return rest.flatten(1).norm(dim=1) / scaled.flatten(1).norm(dim=1).clamp(min=1)


def coupled_newton(stack: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A^(-1/k) for an integer k >= 1: (K, n, n) -> roots (K, n, n), converged (K,).

    X <- X T, M <- T^k M with T = ((k + 1) I - M) / k, until M is I. Iannazzo 2006; Anil et al. 2020,
    arXiv:2002.09018. For k = 4 four products an iteration, and 13 iterations at condition 1e4.
    """
    if k < 1:
        raise ValueError(f"k is {k}; coupled Newton finds A^(-1/k) for integers k from 1")
    return _each(partial(_coupled_newton, k=k), stack)


def _coupled_newton(stack: Tensor, k: int) -> tuple[Tensor, Tensor]:
    identity = _identity(stack)

    def iterate(m: Tensor, _: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        step = ((k + 1) * identity - m) / k
        return torch.bmm(torch.linalg.matrix_power(step, k), m), torch.bmm(x, step)

    scale = _largest(stack) * (2 * MARGIN / (k + 1))
    scaled = stack / _positive(scale)[:, None, None]
    state = (scaled, identity.expand_as(stack))
    (_, x), converged = _until_identity(state, ~_nonzero(scale), lambda m, x: m, iterate)
    return _unscaled(x, scale, k, converged)


def denman_beavers(stack: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A^(-1/k) for k = 2, 4, 8 …: (K, n, n) -> roots (K, n, n), converged (K,).

    Square roots of square roots by Y <- Y T, Z <- T Z with T = (3 I - Z Y) / 2, until Z Y is I: the
    Denman–Beavers iteration without inverses. Higham 2008, Functions of Matrices, (6.35). Three products an
    iteration; at condition 1e4 15 to 19 iterations for the first square root, 10 for the second.
    """
    if k < 2 or k & (k - 1):
        raise ValueError(f"k is {k}; Denman-Beavers takes square roots, for k = 2, 4, 8; use coupled Newton")
    return _each(partial(_denman_beavers, k=k), stack)


def _denman_beavers(stack: Tensor, k: int) -> tuple[Tensor, Tensor]:
    identity = _identity(stack)

    def iterate(product: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        step = (3 * identity - product) / 2
        return torch.bmm(y, step), torch.bmm(step, z)

    scale = _largest(stack) * (MARGIN * 2 / 3)
    y, z = stack / _positive(scale)[:, None, None], identity
    converged = torch.ones_like(scale, dtype=torch.bool)
    for _ in range(k.bit_length() - 1):
        state = (y, identity.expand_as(stack))
        (y, z), now = _until_identity(state, ~_nonzero(scale), lambda y, z: torch.bmm(z, y), iterate)
        converged = converged & now
    return _unscaled(z, scale, k, converged)


def _until_identity(
    state: tuple[Tensor, Tensor],
    done: Tensor,
    product: Callable[[Tensor, Tensor], Tensor],
    iterate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Iterate those not done until their product is I or gets no nearer; what is reached, and who did."""
    identity = _identity(state[0])
    last = torch.full_like(state[0][:, 0, 0], torch.inf)
    for _ in range(MOST):
        near = product(*state)
        error = (near - identity).abs().amax((1, 2))
        done = done | (error < 1e-6) | ((error < NEAR) & (error >= last))
        if not near.is_cuda and done.all():
            break
        last = error
        keep = done[:, None, None]
        a, b = iterate(near, *state)
        state = torch.where(keep, state[0], a), torch.where(keep, state[1], b)
    return state, done


def _unscaled(x: Tensor, scale: Tensor, k: int, converged: Tensor) -> tuple[Tensor, Tensor]:
    """The roots of A, symmetric, from those of A / scale; 0 for zero matrices and where not converged."""
    converged = converged & scale.isfinite()
    x = _where(converged & _nonzero(scale), x, torch.zeros_like(scale[:, None, None]))
    size = torch.where(_nonzero(scale), scale, 1.0).pow(-1 / k)
    return (x + x.mT) * (size / 2)[:, None, None], converged


def _largest(stack: Tensor) -> Tensor:
    """(K,): the largest eigenvalues, from below, by power iteration from four start vectors at once."""
    size = _size(stack)
    index = torch.arange(1, stack.shape[-1] + 1, dtype=torch.float64, device=stack.device)
    start = torch.stack([(index**2 * j).sin() for j in range(1, 5)], dim=1)
    vectors, scaled = start.to(stack.dtype).expand(len(stack), -1, -1), stack / _positive(size)
    sizes = vectors.norm(dim=1, keepdim=True)
    for _ in range(8):
        vectors = torch.bmm(scaled, vectors / _positive(sizes))
        sizes = vectors.norm(dim=1, keepdim=True)
    return sizes.amax((1, 2)) * size[:, 0, 0]


def _size(stack: Tensor) -> Tensor:
    """(K, 1, 1): the largest entries; divided by them, squares neither overflow nor vanish."""
    return torch.linalg.vector_norm(stack, torch.inf, dim=(1, 2), keepdim=True)


def _nonzero(scale: Tensor) -> Tensor:
    """Whether there is something to invert: not for zero matrices and for entries that are not finite."""
    return (scale > 0) & scale.isfinite()


def _positive(x: Tensor) -> Tensor:
    """x, and 1 where it is 0."""
    return torch.where(x == 0, 1.0, x)


def _where(good: Tensor, stack: Tensor, other: Tensor) -> Tensor:
    """The stack, with `other` in place of what is not good; on the CPU nothing is copied where all is."""
    if not good.is_cuda and good.all():
        return stack
    return torch.where(good[:, None, None], stack, other)


def _identity(stack: Tensor) -> Tensor:
    return torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)


def _each(function: Callable[..., Results], *stacks: Tensor) -> Results:
    """function of the stacks; on the CPU of each large matrix apart, on one thread each.

    LAPACK's own threads cost 15 to 45 % more CPU time. The number of threads is torch's again afterwards.
    """
    count, n = stacks[0].shape[:2]
    if stacks[0].is_cuda or n <= SMALL or count == 0:
        return function(*stacks)
    threads = torch.get_num_threads()
    rows = [stack.split(1) for stack in stacks]
    torch.set_num_threads(1)
    try:
        if threads == 1 or count == 1:
            results = list(map(function, *rows))
        else:
            results = list(_pool(threads, os.getpid()).map(function, *rows))
    finally:
        torch.set_num_threads(threads)
    return results[0] if count == 1 else cast(Results, tuple(torch.cat(parts) for parts in zip(*results)))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Kept from call to call; a process that was forked has no threads in its parent's pool."""
    return ThreadPoolExecutor(threads, thread_name_prefix="stretto-roots")
