"""The slow twin of the Shampoo family against theory, torch.optim and numbers worked by hand."""

import pytest
import torch

from stretto.optim.reference import ShampooReference, full_matrix_adagrad, inverse_power, muon

GRAFTS = {
    "sgd": lambda p, **more: torch.optim.SGD(p, momentum=0.0, **more),
    "adagrad": lambda p, **more: torch.optim.Adagrad(p, eps=1e-8, **more),
    "rmsprop": lambda p, **more: torch.optim.RMSprop(p, alpha=0.9, eps=1e-8, **more),
    "adam": lambda p, **more: torch.optim.Adam(p, betas=(0.8, 0.9), eps=1e-8, **more),
}
PLAIN = {"betas": (0.0, 1.0), "graft": None, "ridge": "absolute", "ridge_eps": 1e-3, "every": 1}


def _draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _orthogonal(n, seed):
    return torch.linalg.qr(_draw(n, n, seed=seed))[0]


def _updates(optimizer, gradients):
    """What each step subtracts, at rate 1 from weights of 0."""
    return [-optimizer.step(torch.zeros_like(g), g, 1.0) for g in gradients]


def _matches(optimizer, theirs, shape=(3, 4), steps=20, lr=0.01):
    """The weights stay those of an optimizer of torch's; the gradient is of a bowl, with noise."""
    mine = _draw(*shape)
    p = torch.nn.Parameter(mine.clone())
    other = theirs([p], lr=lr)
    for step in range(steps):
        noise = _draw(*shape, seed=100 + step)
        p.grad = p.detach() + noise
        mine = optimizer.step(mine, mine + noise, lr)
        other.step()
        torch.testing.assert_close(mine, p.detach(), rtol=1e-12, atol=1e-12)


# -- theory


def test_a_vector_is_full_matrix_adagrad():
    gradients = [_draw(6, seed=i) for i in range(20)]
    for i, p in enumerate(_updates(ShampooReference(**PLAIN), gradients)):
        torch.testing.assert_close(p, full_matrix_adagrad(gradients[: i + 1], 1e-3), rtol=1e-10, atol=1e-10)


def test_full_matrix_adagrad_by_hand():
    """g = (3, 4): its direction has the eigenvalue 25, so the update is g / sqrt(25 + 11)."""
    g = torch.tensor([3.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(full_matrix_adagrad([g], 11.0), g / 6)


@pytest.mark.parametrize("shape", [(5, 5), (3, 6), (6, 3)])
def test_without_memory_the_update_is_the_orthogonal_factor(shape):
    """One-sided with p = 1/2 too; the pseudo-inverse leaves out the null space of the longer side."""
    g = _draw(*shape)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    for direction in ("root", "eigen", "one_sided"):
        optimizer = ShampooReference(betas=(0.0, 0.0), graft=None, ridge="pinv", every=1, direction=direction)
        torch.testing.assert_close(_updates(optimizer, [g])[0], u @ vh, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("graft", [None, "sgd"])
@pytest.mark.parametrize("direction", ["root", "one_sided", "kl"])
def test_shampoo_turns_with_the_weight(direction, graft):
    """Equivariance under W -> U W Vᵀ."""
    u, v = _orthogonal(5, 1), _orthogonal(4, 2)
    gradients = [_draw(5, 4, seed=i) for i in range(6)]
    settings = {"direction": direction, "graft": graft, "ridge_eps": 1e-3, "every": 2, "start": 2}
    straight = _updates(ShampooReference(**settings), gradients)
    turned = _updates(ShampooReference(**settings), [u @ g @ v.T for g in gradients])
    for p, q in zip(straight, turned):
        torch.testing.assert_close(u @ p @ v.T, q, rtol=1e-10, atol=1e-10)


def test_soap_turns_with_the_weight():
    """A square block and a first gradient of full rank: elsewhere the basis of the null space is arbitrary."""
    u, v = _orthogonal(4, 1), _orthogonal(4, 2)
    gradients = [_draw(4, 4, seed=i) for i in range(6)]
    settings = {"direction": "soap", "graft": None, "every": 2}
    straight = _updates(ShampooReference(**settings), gradients)
    turned = _updates(ShampooReference(**settings), [u @ g @ v.T for g in gradients])
    for p, q in zip(straight, turned):
        torch.testing.assert_close(u @ p @ v.T, q, rtol=1e-4, atol=1e-4)


def test_kl_finds_the_factors_of_a_kronecker_structured_gradient():
    """G = C1 Z C2ᵀ with white Z has the covariance (C1 C1ᵀ) ⊗ (C2 C2ᵀ): the statistics become both, to scale.

    Whitening waits for statistics of full rank, or their null spaces are blown up.
    """
    c1, c2 = torch.eye(3) + 0.3 * _draw(3, 3, seed=1), torch.eye(4) + 0.3 * _draw(4, 4, seed=2)
    optimizer = ShampooReference(direction="kl", graft=None, betas=(0.0, 0.998), every=5, start=20)
    for i in range(3000):
        gradient = c1 @ _draw(3, 4, seed=10 + i) @ c2.T
        optimizer.step(torch.zeros_like(gradient), gradient, 1.0)
    found, truths = optimizer._matrices(), [c1 @ c1.T, c2 @ c2.T]
    for k, truth in enumerate(truths):
        assert (found[k] / found[k].norm() - truth / truth.norm()).norm() < 0.05
    product = found[0].trace() * found[1].trace()
    assert product.item() == pytest.approx((truths[0].trace() * truths[1].trace()).item(), rel=0.1)


def test_trace_scaling_makes_the_product_of_the_factors_the_second_moment():
    """For G = a bᵀ, (GGᵀ ⊗ GᵀG) / tr is the second moment of vec G, and p = 1/2 its inverse root: G / ||G||."""
    g = torch.outer(_draw(3), _draw(4, seed=1))
    optimizer = ShampooReference(
        betas=(0.0, 1.0), graft=None, ridge="pinv", every=1, power=0.5, trace_scaling=True
    )
    torch.testing.assert_close(_updates(optimizer, [g])[0], g / g.norm())


# -- torch.optim's


@pytest.mark.parametrize("graft", GRAFTS)
@pytest.mark.parametrize("direction", ["diagonal", "root"])
def test_the_grafting_method_alone_is_torchs(direction, graft):
    """For root: before its first refresh, which never comes. L2 decay as in torch."""
    optimizer = ShampooReference(
        (0.8 if graft == "adam" else 0.0, 0.9), graft=graft, direction=direction, start=100, every=1,
        weight_decay=0.1, decay="l2",
    )  # fmt: skip
    _matches(optimizer, lambda p, lr: GRAFTS[graft](p, lr=lr, weight_decay=0.1))


@pytest.mark.parametrize(("direction", "graft"), [("diagonal", None), ("soap", None), ("kl", "adam")])
def test_before_a_refresh_decoupled_decay_is_adamws(direction, graft):
    """SOAP in the identity basis too."""
    optimizer = ShampooReference((0.8, 0.9), weight_decay=0.3, direction=direction, graft=graft, start=100)
    _matches(optimizer, lambda p, lr: torch.optim.AdamW(p, lr=lr, betas=(0.8, 0.9), weight_decay=0.3))


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_soap_in_the_identity_basis_is_adam(shape):
    optimizer = ShampooReference((0.8, 0.9), direction="soap", graft=None, start=100)
    _matches(optimizer, lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.8, 0.9)), shape)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_after_preconditioning_is_that_of_sgd(nesterov):
    optimizer = ShampooReference(
        (0.0, 0.9), direction="diagonal", graft="sgd", momentum=0.9, nesterov=nesterov
    )
    _matches(optimizer, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=nesterov))


@pytest.mark.parametrize("bias_correction", [True, False])
def test_beta3_of_beta1_is_adams_and_of_its_square_nadams(bias_correction):
    """b3 = b1²: Ĝ is b1 M_new + (1 - b1) G, Nesterov's look ahead."""
    gradients = [_draw(3, seed=i) for i in range(4)]
    settings = {"direction": "diagonal", "graft": "sgd", "bias_correction": bias_correction}
    updates = _updates(ShampooReference((0.8, 0.9), beta3=0.64, **settings), gradients)
    average = torch.zeros(3, dtype=torch.float64)
    for t, (g, p) in enumerate(zip(gradients, updates), start=1):
        average = 0.8 * average + 0.2 * g
        ahead = 0.8 * average + 0.2 * g
        torch.testing.assert_close(p, ahead / (1 - 0.8 ** (t + 1)) if bias_correction else ahead)


def test_a_spectral_step_with_nesterov_momentum_is_muons():
    """Nesterov is b3 = b1², without bias correction."""
    weight = other = _draw(6, 4)
    average = torch.zeros_like(weight)
    optimizer = ShampooReference((0.9, 0.9), 0, 0.1, "spectral", beta3=0.81, bias_correction=False)
    for step in range(4):
        gradient = _draw(6, 4, seed=step)
        weight = optimizer.step(weight, gradient, 0.1)
        other, average = muon(other, gradient, average, 0.1, 0.9, weight_decay=0.1)
        torch.testing.assert_close(weight, other, rtol=1e-12, atol=1e-12)


def test_soaps_second_moment_follows_a_basis_that_only_changes_its_order():
    """Of diagonal gradients whose largest entry wanders the bases are permutations, and SOAP is Adam."""
    gradients = [torch.diag(10.0 ** _draw(4, seed=i)) for i in range(12)]
    soap = ShampooReference((0.8, 0.9), direction="soap", graft=None, every=1)
    adam = ShampooReference((0.8, 0.9), direction="diagonal")
    orders = set()
    for g in gradients:
        torch.testing.assert_close(_updates(soap, [g]), _updates(adam, [g]), rtol=1e-12, atol=1e-12)
        orders.add(tuple(soap.bases[0].abs().argmax(dim=0).tolist()))
    assert len(orders) > 2


# -- the schedule and the sizes


@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("phase", [0, 2])
def test_it_refreshes_once_in_every_steps_at_its_phase(start, phase):
    optimizer = ShampooReference(start=start, every=3, phase=phase)
    changed, roots = [], None
    for t in range(1, 12):
        optimizer.step(torch.zeros(3, 2, dtype=torch.float64), _draw(3, 2, seed=t), 1.0)
        if roots is not None and not torch.equal(roots, optimizer.roots[0]):
            changed.append(t)
        roots = optimizer.roots[0]
    assert [t for t in range(2, 12) if t >= start and (t - start) % 3 == phase] == changed


@pytest.mark.parametrize("stats_every", [1, 3])
@pytest.mark.parametrize("graft", ["sgd", "adagrad", "rmsprop", "adam"])
@pytest.mark.parametrize("direction", ["root", "eigen", "one_sided", "kl", "soap"])
def test_a_grafted_step_has_the_norm_of_the_method_grafted(direction, graft, stats_every):
    gradients = [_draw(3, 4, seed=i) for i in range(5)]
    settings = {"graft": graft, "graft_beta2": 0.7, "stats_every": stats_every}
    mine = _updates(ShampooReference(direction=direction, every=2, **settings), gradients)
    theirs = _updates(ShampooReference(direction="diagonal", **settings), gradients)
    for p, q in zip(mine, theirs):
        assert p.norm().item() == pytest.approx(q.norm().item(), rel=1e-12)
        assert not torch.allclose(p, q)


@pytest.mark.parametrize("direction", ["root", "one_sided", "kl"])
def test_before_the_first_refresh_an_update_without_graft_has_adams_size(direction):
    """Whatever the gradient's scale: its root mean square is about 1, or 1 / sqrt(n) as its singular values say."""
    for scale in (1e-6, 1e6):
        optimizer = ShampooReference(direction=direction, graft=None, start=100)
        [p] = _updates(optimizer, [scale * _draw(4, 4)])
        assert 0.2 < p.square().mean().sqrt() < 1.01


def test_statistics_are_taken_every_so_many_steps_and_corrected_by_their_number():
    optimizer = ShampooReference(betas=(0.0, 0.5), graft=None, stats_every=2, every=1)
    gradients = [_draw(2, 2, seed=i) for i in range(3)]
    _updates(optimizer, gradients)
    first, _, third = gradients
    expected = (0.25 * first @ first.T + 0.5 * third @ third.T) / 0.75
    torch.testing.assert_close(optimizer._matrices()[0], expected)


@pytest.mark.parametrize(
    ("power", "expected"),
    [(None, 1.0), (0.25, 1.0), ({3: 0.5}, 1.0), ({2: 0.5}, 0.25), ({2: (0.5, 0.25)}, 0.5)],
)
def test_powers_are_for_all_orders_or_by_order_or_by_side(power, expected):
    """Of a gradient of 4 both statistics are 16, so that p = ¼ halves it twice and p = ½ quarters it."""
    g = torch.full((1, 1), 4.0, dtype=torch.float64)
    optimizer = ShampooReference(**PLAIN | {"power": power, "ridge_eps": 0.0})
    assert _updates(optimizer, [g])[0].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ridge", "ridge_eps", "expected", "of_zeros"),
    [
        ("relative", 9 / 16, [1 / 3, 1 / 5], [0.0, 0.0]),
        ("absolute", 9.0, [1 / 3, 1 / 5], [1 / 3, 1 / 3]),
        ("pinv", 9.0, [0.0, 1 / 4], [0.0, 0.0]),
    ],
)
def test_ridges_by_hand(ridge, ridge_eps, expected, of_zeros):
    """Eigenvalues 0, or a little below by rounding, and 16, to the power -½."""
    for small in (0.0, -1e-16, 1e-16):
        found = inverse_power(torch.tensor([small, 16.0], dtype=torch.float64), 0.5, ridge, ridge_eps)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    found = inverse_power(torch.zeros(2, dtype=torch.float64), 0.5, ridge, ridge_eps)
    assert found.tolist() == pytest.approx(of_zeros)


@pytest.mark.parametrize(
    ("decay", "left"),
    [("decoupled", 0.9 * 0.95), ("l2", 0.9 * 0.95), ("corrected", 0.9 * 0.975), ("independent", 0.9 * 0.9)],
)
def test_decays_by_hand(decay, left):
    """Without a gradient, at rates of 1 and then ½; with SGD, L2 decay is decoupled decay."""
    optimizer = ShampooReference((0.0, 0.9), weight_decay=0.1, direction="diagonal", graft="sgd", decay=decay)
    weight = torch.ones(2, dtype=torch.float64)
    for lr in (1.0, 0.5):
        weight = optimizer.step(weight, torch.zeros_like(weight), lr)
    torch.testing.assert_close(weight, torch.full_like(weight, left))


@pytest.mark.parametrize(("clip", "expected"), [(1.0, 1.0), (9.0, 2.5)])
def test_a_clipped_update_has_that_root_mean_square_at_most(clip, expected):
    g = torch.tensor([[3.0, 4.0, 0.0, 0.0]], dtype=torch.float64)
    optimizer = ShampooReference((0.0, 0.9), direction="diagonal", graft="sgd", clip=clip)
    torch.testing.assert_close(_updates(optimizer, [g])[0], g * expected / 2.5)


@pytest.mark.parametrize(("scale", "size"), [("match_rms", 0.2 * 12**0.5), ("original", 1.0), (None, 1.0)])
def test_spectral_updates_are_an_orthogonal_factor_to_scale(scale, size):
    """(3, 4, 3) is seen as (3, 12); of a tall one the original scale is sqrt(m / n)."""
    settings = {"scale": scale, "iterations": 12, "coefficients": "polar"}
    g = _draw(3, 4, 3)
    u, _, vh = torch.linalg.svd(g.flatten(1), full_matrices=False)
    [p] = _updates(ShampooReference(direction="spectral", **settings), [g])
    torch.testing.assert_close(p.flatten(1), size * u @ vh)
    [tall] = _updates(ShampooReference(direction="spectral", **settings), [g.flatten(1).T])
    torch.testing.assert_close(tall, (2.0 if scale == "original" else size) * vh.T @ u.T)


@pytest.mark.parametrize("direction", ["root", "soap", "kl"])
def test_what_is_orthogonalised_afterwards_has_singular_values_of_one_size(direction):
    settings = {"then": "orthogonalize", "iterations": 12, "coefficients": "polar", "scale": None}
    optimizer = ShampooReference(direction=direction, graft=None, every=2, **settings)
    for p in _updates(optimizer, [_draw(3, 5, seed=i) for i in range(4)]):
        torch.testing.assert_close(torch.linalg.svdvals(p), torch.ones(3, dtype=torch.float64))


def test_balanced_neurons_have_rows_of_one_size_and_keep_the_norm():
    """After the first step, which knows no other; the norm is that of an orthogonal factor always."""
    settings = {"neuron_beta2": 0.9, "scale": None}
    optimizer = ShampooReference(direction="spectral", **settings)
    updates = _updates(optimizer, [_draw(6, 3, seed=i) for i in range(4)])
    torch.testing.assert_close(updates[0].norm(dim=1), torch.full((6,), 0.5**0.5, dtype=torch.float64))
    for p in updates:
        assert p.norm().item() == pytest.approx(3**0.5)


def test_only_the_sides_named_are_preconditioned():
    """One side of p = ½ by name is `one_sided`, which takes the smaller."""
    gradients = [_draw(3, 5, seed=i) for i in range(4)]
    named = _updates(ShampooReference(sides=(0,), every=2), gradients)
    small = _updates(ShampooReference(direction="one_sided", every=2), gradients)
    for p, q in zip(named, small):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("graft", [None, "adam"])
@pytest.mark.parametrize("direction", ["root", "eigen", "one_sided", "kl", "soap"])
def test_a_gradient_of_zeros_moves_nothing(direction, graft):
    optimizer = ShampooReference(direction=direction, graft=graft, every=2, phase=1)
    for p in _updates(optimizer, [torch.zeros(3, 2, dtype=torch.float64)] * 4):
        assert not p.any()
