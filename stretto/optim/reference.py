"""Every rule for one tensor, without tricks: what the fast optimizers are tested against."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stretto.optim.roots import POLAR, QUINTIC

Step = Callable[[Tensor], Tensor]  # from where the gradient is taken to the optimizer's step from there


def orthogonalize(matrix: Tensor, iterations: int = 5, coefficients: str = "jordan") -> Tensor:
    """x <- a x + b (x xᵀ) x + c (x xᵀ)² x, from x of unit Frobenius norm: (m, n) -> (m, n)."""
    x = matrix / matrix.norm().clamp(min=1e-20)
    for i in range(iterations):
        a, b, c = QUINTIC
        if coefficients == "polar":
            a, b, c = POLAR[min(i, len(POLAR) - 1)]
            safety = 1.01 if i < len(POLAR) - 1 else 1.0
            a, b, c = a / safety, b / safety**3, c / safety**5
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def muon(
    parameter: Tensor,
    gradient: Tensor,
    average: Tensor,
    lr: float,
    momentum: float = 0.95,
    iterations: int = 5,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One step of Muon: the new parameter (out, ...) and the new average of its gradients, zero at first."""
    average = momentum * average + (1 - momentum) * gradient
    ahead = momentum * average + (1 - momentum) * gradient
    factor = orthogonalize(ahead.reshape(len(ahead), -1), iterations)
    size = 0.2 * max(factor.shape) ** 0.5
    return (1 - lr * weight_decay) * parameter - lr * size * factor.reshape(parameter.shape), average


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step number `step`, from 1, of AdamW: parameter, average, average square; both begin at zero."""
    average = betas[0] * average + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * gradient**2
    unbiased, spread = average / (1 - betas[0] ** step), torch.sqrt(square / (1 - betas[1] ** step))
    return (1 - lr * weight_decay) * parameter - lr * unbiased / (spread + eps), average, square


def normalize_neurons(factor: Tensor, squares: Tensor, beta2: float = 0.95) -> tuple[Tensor, Tensor]:
    """NorMuon's rows of equal size over time, root mean square 1: (m, n), (m,) -> the same."""
    squares = beta2 * squares + (1 - beta2) * (factor**2).mean(dim=1)
    scaled = factor / (squares.sqrt()[:, None] + 1e-8)
    return scaled / (scaled**2).mean().sqrt(), squares


def lion(
    parameter: Tensor,
    gradient: Tensor,
    average: Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One step of Lion: the new parameter and the new average of its gradients, zero at first."""
    update = torch.sign(betas[0] * average + (1 - betas[0]) * gradient)
    average = betas[1] * average + (1 - betas[1]) * gradient
    return parameter - lr * (update + weight_decay * parameter), average


def cautious_decay(before: Tensor, after: Tensor, rate: float) -> Tensor:
    """Decay at this rate what a step moved no further from 0."""
    return after - torch.where((before - after) * before >= 0, rate * before, 0.0)


def averaging(z: Tensor, x: Tensor, step: Step, interpolation: float, share: float) -> tuple[Tensor, Tensor]:
    """One step of Schedule-Free (share lr² / sum of lr²) or primal averaging (constant): new z and x."""
    z = z + step((1 - interpolation) * z + interpolation * x)
    return z, (1 - share) * x + share * z


def ema_nesterov(
    x: Tensor, trend: Tensor, step: Step, extrapolation: float, rate: float
) -> tuple[Tensor, Tensor]:
    """One step of EMA-Nesterov: new x and trend, which is zero at first."""
    ahead = x + extrapolation * trend
    new = ahead + step(ahead)
    return new, (1 - rate) * trend + rate * (new - x)


def lookahead(slow: Tensor, steps: list[Step], part: float) -> Tensor:
    """One round of Lookahead: the optimizer's steps, then part of the way there."""
    fast = slow
    for step in steps:
        fast = fast + step(fast)
    return slow + part * (fast - slow)


def hyperball(weight: Tensor, step: Tensor, lr: float, radius: float) -> Tensor:
    """Hyperball: R normalize(W - lr R normalize(u)), where the inner optimizer goes from W to W + step."""
    if radius == 0 or not step.any():
        return weight + step
    turned = weight + lr * radius * step / step.norm()
    return radius * turned / turned.norm()


def update_floor(weight: Tensor, step: Tensor, lr: float, floor: float) -> Tensor:
    """The step, of norm lr * floor * ||W|| at least."""
    least = lr * floor * weight.norm()
    return weight + (step * least / step.norm() if 0 < step.norm() < least else step)


def full_matrix_adagrad(gradients: list[Tensor], eps: float) -> Tensor:
    """(sum of g gᵀ + eps I)^(-1/2) g for the last of the gradients, vectors (n,), from their singular vectors."""
    _, sizes, basis = torch.linalg.svd(torch.stack(gradients), full_matrices=False)
    return basis.T @ (basis @ gradients[-1] / (sizes**2 + eps).sqrt())


def unfold(tensor: Tensor, k: int) -> Tensor:
    """The tensor as a matrix with dim k down and all others across: (d_k, product of the others)."""
    return tensor.movedim(k, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]


def along(tensor: Tensor, matrix: Tensor, k: int) -> Tensor:
    """The tensor with every vector along its dim k multiplied by the matrix: tensor ×_k matrix."""
    return torch.tensordot(matrix, tensor, dims=([1], [k])).movedim(0, k)


def inverse_power(eigenvalues: Tensor, power: float, ridge: str, ridge_eps: float) -> Tensor:
    """λ^-power of a matrix that is positive semidefinite but for rounding; ridge as in `ShampooReference`."""
    largest = eigenvalues.max()
    if largest <= 0 and ridge != "absolute":
        return torch.zeros_like(eigenvalues)
    if ridge == "pinv":
        smallest = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * largest
        return torch.where(eigenvalues > smallest, eigenvalues.clamp(min=smallest) ** -power, 0.0)
    added = ridge_eps * largest if ridge == "relative" else ridge_eps
    return (eigenvalues.clamp(min=0) + added) ** -power


def accumulate(average: Tensor, new: Tensor, beta: float) -> Tensor:
    """The exponential average, or for beta = 1 the sum."""
    return average + new if beta == 1 else beta * average + (1 - beta) * new


def inverse_size(size: float, power: float) -> float:
    """size^-power, the root of size I before there is another; 0 for 0."""
    return size**-power if size > 0 else 0.0


@dataclass
class ShampooReference:
    """The whole Shampoo family for one tensor that is one block, as the formulas are written.

    Each dim of it is a side, or only those in `sides`, and has a statistic L_k (d_k, d_k) and a root R_k or a
    basis Q_k. `step` is a step; what follows are its parts, in the order in which they happen. A beta2 of 1
    stands for a sum in place of an average. The arguments are `Shampoo`'s, and `phase` in [0, every), the step
    of each `every` at which this block refreshes; `graft` as it stands counts for soap too.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    direction: str = "root"  # or eigen, one_sided, kl, soap, spectral, diagonal
    # p, for all tensors, or by their order; a tuple has one for each side
    power: float | dict[int, float | tuple[float, ...]] | None = None
    ridge: str = "relative"  # (λ + ridge_eps λ_max)^-p; absolute: (λ + ridge_eps)^-p; pinv: no small λ at all
    ridge_eps: float = 1e-6
    trace_scaling: bool = False
    graft: str | None = "adam"  # or sgd, adagrad, rmsprop
    graft_beta2: float | None = None
    beta3: float | None = None
    bias_correction: bool = True
    start: int = 1
    every: int = 10
    phase: int = 0
    stats_every: int = 1
    then: str | None = None  # or orthogonalize
    iterations: int = 5
    coefficients: str = "jordan"
    neuron_beta2: float = 0.0
    scale: str | None = "match_rms"
    momentum: float = 0.0
    nesterov: bool = False
    clip: float | None = None
    decay: str = "decoupled"  # or l2, corrected, independent
    sides: tuple[int, ...] | None = None

    t: int = field(default=0, init=False)  # steps taken
    updates: int = field(default=0, init=False)  # of the statistics
    refreshed: bool = field(default=False, init=False)
    peak_lr: float = field(default=0.0, init=False)
    average: Tensor = field(init=False, repr=False)  # M
    velocity: Tensor = field(init=False, repr=False)  # B, the momentum after preconditioning
    squares: Tensor = field(init=False, repr=False)  # V, the grafting method's
    rotated_squares: Tensor = field(init=False, repr=False)  # E, in the bases Q_k
    rows: Tensor = field(init=False, repr=False)  # NorMuon's, (d_1,)
    powers: dict[int, float] = field(init=False, repr=False)  # p of each side
    statistics: dict[int, Tensor] = field(init=False, repr=False)  # L_k
    roots: dict[int, Tensor] = field(init=False, repr=False)  # R_k
    bases: dict[int, Tensor] = field(init=False, repr=False)  # Q_k, with a basis vector in each column

    def step(self, weight: Tensor, gradient: Tensor, lr: float) -> Tensor:
        """The weight after one step from `weight` along `gradient`."""
        self.t += 1
        self.peak_lr = max(lr, self.peak_lr)
        if self.decay == "l2":
            gradient = gradient + self.weight_decay * weight
        if self.t == 1:
            self._begin(gradient)
        if self.graft is None and not any(statistic.any() for statistic in self.statistics.values()):
            self._size(gradient)
        if (self.t - 1) % self.stats_every == 0:
            self._update_statistics(gradient)
        if self.t >= self.start and (self.t - self.start) % self.every == self.phase:
            self._refresh()
        p = self._direction(gradient, self._momentum(gradient))
        if self.clip is not None and (rms := p.square().mean().sqrt()) > self.clip:
            p = p * self.clip / rms
        self.velocity = self.momentum * self.velocity + p
        if self.momentum:
            p = p + self.momentum * self.velocity if self.nesterov else self.velocity
        return (1 - self._decay_rate(lr)) * weight - lr * p

    def _begin(self, gradient: Tensor) -> None:
        zero, shape = torch.zeros_like(gradient), gradient.shape
        self.average = self.squares = self.rotated_squares = self.velocity = zero
        self.rows = zero.flatten(1).sum(dim=1) if len(shape) > 1 else zero
        if self.direction in ("spectral", "diagonal"):
            self.sides = ()
        elif self.sides is None:
            smallest = (min(range(len(shape)), key=lambda k: shape[k]),)
            self.sides = smallest if self.direction == "one_sided" else tuple(range(len(shape)))
        identities = {k: torch.eye(shape[k], dtype=zero.dtype) for k in self.sides}
        self.statistics = {k: torch.zeros_like(identity) for k, identity in identities.items()}
        self.bases = identities
        self.powers = dict(zip(self.sides, self._powers(len(shape))))
        self.roots = dict(identities)

    def _size(self, gradient: Tensor) -> None:
        """Until the first refresh: multiples of the identity that bring the first gradient to a usual size."""
        sides, squares = len(self.sides or ()), gradient.square().sum().item()
        for k, root in self.roots.items():
            if (
                squares > 0 and self.direction == "kl"
            ):  # which has no zero to begin at: each L_k needs the other roots
                size = (squares / gradient.numel()) ** (-0.5 / sides)
                self.statistics[k] = size**-2 * torch.eye(len(root), dtype=root.dtype)
            elif squares > 0:
                trace = squares ** (1 / sides) if self.trace_scaling else squares
                size = (trace / len(root)) ** -self.powers[k]
            else:
                continue
            self.roots[k] = size * torch.eye(len(root), dtype=root.dtype)

    def _powers(self, order: int) -> tuple[float, ...]:
        given = self.power.get(order) if isinstance(self.power, dict) else self.power
        if isinstance(given, tuple):
            return given
        sides = len(self.sides or ())
        usual = 0.5 if self.direction in ("one_sided", "kl") else 0.5 / max(sides, 1)
        return (usual if given is None else given,) * sides

    def _update_statistics(self, gradient: Tensor) -> None:
        """L_k <- b2 L_k + (1 - b2) G_(k) G_(k)ᵀ; KL: of G whitened along all other sides, over their size."""
        self.updates += 1
        for k, statistic in self.statistics.items():
            seen, count = gradient, 1.0
            if self.direction == "kl":
                count = gradient.numel() / gradient.shape[k]
                for j in self.roots.keys() - {k}:
                    seen = along(seen, self.roots[j], j)
            outer = unfold(seen, k) @ unfold(seen, k).T / count
            self.statistics[k] = accumulate(statistic, outer, self.betas[1])

    def _matrices(self) -> dict[int, Tensor]:
        """A_k: the statistics without bias; with trace scaling, over a power of the trace, so that ⊗ A_k ~ H."""
        beta2 = 1.0 if self.direction == "kl" else self.betas[1]  # KL's begin as they should be
        matrices = {k: self._unbiased(s, beta2, self.updates) for k, s in self.statistics.items()}
        if self.trace_scaling and matrices:
            trace = next(iter(matrices.values())).trace()
            excess = trace.clamp(min=1e-30) ** ((len(matrices) - 1) / len(matrices))
            return {k: a / excess for k, a in matrices.items()}
        return matrices

    def _refresh(self) -> None:
        """R_k = A_k^-p; SOAP: Q_k, and its second moment E goes along, by the squares of the change of basis.

        E in the identity basis says little of another one: the first E is what the factors say, the product of
        their eigenvalues (of a dim that is no side, E's marginal) over the power of the trace.
        """
        if not any(statistic.any() for statistic in self.statistics.values()):
            return
        marginals = []
        for k in range(self.average.ndim):
            others = [j for j in range(self.average.ndim) if j != k]
            marginals.append(self.rotated_squares.sum(dim=others) if others else self.rotated_squares)
        for k, a in self._matrices().items():
            eigenvalues, q = torch.linalg.eigh(a)
            self.roots[k] = q * inverse_power(eigenvalues, self.powers[k], self.ridge, self.ridge_eps) @ q.T
            self.rotated_squares = along(self.rotated_squares, (q.T @ self.bases[k]) ** 2, k)
            self.bases[k], marginals[k], total = q, eigenvalues.clamp(min=0), eigenvalues.clamp(min=0).sum()
        if not self.refreshed and self.direction == "soap":
            product = functools.reduce(lambda a, b: a[..., None] * b, [m / m.sum() for m in marginals])
            self.rotated_squares = product * total * (1 - self.betas[1] ** (self.t - 1))
        self.refreshed = True

    def _momentum(self, gradient: Tensor) -> Tensor:
        """Ĝ = (b3 M_old + (1 - b3) G) / (1 - b3 b1^(t-1)), where M <- b1 M + (1 - b1) G."""
        beta1 = self.betas[0]
        usual = beta1**2 if self.direction == "spectral" else beta1
        beta3 = usual if self.beta3 is None else self.beta3
        ahead = beta3 * self.average + (1 - beta3) * gradient
        self.average = beta1 * self.average + (1 - beta1) * gradient
        return ahead / (1 - beta3 * beta1 ** (self.t - 1)) if self.bias_correction else ahead

    def _direction(self, gradient: Tensor, ahead: Tensor) -> Tensor:
        borrowed = self._borrowed(gradient, ahead)
        if self.direction == "diagonal":
            return borrowed
        if self.direction == "spectral":
            return self._orthogonal(ahead)
        p = self._soap(gradient, ahead) if self.direction == "soap" else self._whiten(ahead)
        if self.then == "orthogonalize":
            p = self._orthogonal(p)
        if self.graft is None:
            return p
        return p * borrowed.norm() / p.norm().clamp(min=1e-30) if self.refreshed else borrowed

    def _whiten(self, p: Tensor) -> Tensor:
        for k, root in self.roots.items():
            p = along(p, root, k)
        return p

    def _soap(self, gradient: Tensor, ahead: Tensor) -> Tensor:
        """Adam in the bases: Q [(Qᵀ Ĝ Q) / (√E + eps)] Qᵀ, where E <- b2 E + (1 - b2) (Qᵀ G Q)²."""
        for k, q in self.bases.items():
            gradient, ahead = along(gradient, q.T, k), along(ahead, q.T, k)
        self.rotated_squares = accumulate(self.rotated_squares, gradient**2, self.betas[1])
        p = ahead / (self._unbiased(self.rotated_squares, self.betas[1], self.t).sqrt() + self.eps)
        for k, q in self.bases.items():
            p = along(p, q, k)
        return p

    def _orthogonal(self, p: Tensor) -> Tensor:
        """The orthogonal factor of p as a matrix (d_1, rest), its rows balanced if so wished, to scale."""
        factor = orthogonalize(unfold(p, 0), self.iterations, self.coefficients)
        m, n = factor.shape
        if self.neuron_beta2:  # with the norm of an orthogonal factor, as before
            factor, self.rows = normalize_neurons(factor, self.rows, self.neuron_beta2)
            factor = factor / max(m, n) ** 0.5
        sizes = {"match_rms": 0.2 * max(m, n) ** 0.5, "original": max(1.0, m / n) ** 0.5, None: 1.0}
        return sizes[self.scale] * factor.reshape(p.shape)

    def _borrowed(self, gradient: Tensor, ahead: Tensor) -> Tensor:
        """The step of the method that lends its size, as torch.optim takes it."""
        method = self.graft or "adam"
        beta2 = self.betas[1] if self.graft_beta2 is None else self.graft_beta2
        if method == "adagrad":
            beta2 = 1.0
        self.squares = accumulate(self.squares, gradient**2, beta2)
        if method == "sgd":
            return ahead
        if method == "adam":
            return ahead / (self._unbiased(self.squares, beta2, self.t).sqrt() + self.eps)
        return ahead / (self.squares.sqrt() + self.eps)

    def _unbiased(self, average: Tensor, beta: float, updates: int) -> Tensor:
        return average / (1 - beta**updates) if self.bias_correction and beta < 1 else average

    def _decay_rate(self, lr: float) -> float:
        share = {"l2": 0.0, "decoupled": lr, "corrected": lr * lr / (self.peak_lr or 1.0), "independent": 1.0}
        return self.weight_decay * share[self.decay]
