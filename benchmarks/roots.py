"""Inverse fourth roots: how accurate each solver is, and the CPU milliseconds of all threads that it takes.

    python benchmarks/roots.py [--sizes 64 256 1024] [--count 2] [--condition 1e4]

Residual: ||X⁴A - I||_F / √n, the worst of the stack. Time: a matrix, the least of `--repeats`; beside it the ratio
to torch.linalg.eigh of the same stack. Below, one step of orthogonal iteration from the exact eigenvectors: its
residual is what it leaves off the diagonal.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from stretto.optim import roots


def spread(n: int, condition: float, count: int) -> Tensor:
    """Matrices (count, n, n), float64: eigenvalues evenly spaced in the logarithm, random eigenvectors."""
    random = torch.randn(count, n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(random)[0]
    values = condition ** -torch.linspace(0, 1, n, dtype=torch.float64)
    return (basis * values) @ basis.mT


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    call()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return 1e3 * min(taken)


def rows(stack: Tensor, repeats: int) -> list[tuple[str, float, float]]:
    """Name, residual and milliseconds of each solver."""
    identity = torch.eye(stack.shape[-1], dtype=torch.float64)
    table = []
    for solver in roots.SOLVERS:
        found, converged = roots.inverse_root(stack, 0.25, solver=solver)
        rest = torch.linalg.matrix_power(found.double(), 4) @ stack.double() - identity
        worst = rest.norm(dim=(1, 2)).max().item() / len(identity) ** 0.5
        taken = milliseconds(lambda solver=solver: roots.inverse_root(stack, 0.25, solver=solver), repeats)
        table.append((solver if converged.all() else f"{solver} (not converged)", worst, taken))
    _, vectors, _ = roots.eigh(stack)
    left = roots.off_diagonal(stack, roots.orthogonal_iteration(stack, vectors)[1]).max().item()
    taken = milliseconds(lambda: roots.orthogonal_iteration(stack, vectors), repeats)
    return [*table, ("orthogonal iteration", left, taken)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--count", type=int, default=2, help="matrices in the stack")
    parser.add_argument("--condition", type=float, default=1e4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {args.count} matrices, condition {args.condition:g}\n")
    print(f"{'solver':<22}{'n':>6}{'dtype':>9}{'residual':>11}{'CPU ms':>9}{'/ eigh':>8}")
    for n in args.sizes:
        exact = spread(n, args.condition, args.count)
        for dtype in (torch.float32, torch.float64):
            stack = exact.to(dtype)
            eigh = milliseconds(lambda stack=stack: torch.linalg.eigh(stack), args.repeats)
            for name, residual, taken in rows(stack, args.repeats):
                kind = str(dtype).removeprefix("torch.")
                time_each = taken / args.count
                print(f"{name:<22}{n:>6}{kind:>9}{residual:>11.1e}{time_each:>9.1f}{taken / eigh:>8.2f}")


if __name__ == "__main__":
    main()
