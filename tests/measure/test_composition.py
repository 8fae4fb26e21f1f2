"""The composition to use: found more often than by other rules, shares that multiply, honest about misses."""

import math
from itertools import permutations, product

import numpy as np
import pytest

from stretto.measure.composition import _given_misses, _given_times, best, posterior
from stretto.measure.designs import alone, expand, fraction, terms
from stretto.measure.effects import fit
from stretto.measure.outcomes import Outcome

METHODS = "abcde"
MODEL = terms(5)[1:]
FRACTION = fraction(METHODS, 1).rows
ALL = np.array(list(product((0, 1), repeat=5)))


def study(truth, seeds=2, spread=0.07, cut=math.inf, seed=0, rows=FRACTION):
    """A fitted study of the coefficients `truth`."""
    rows, blocks = np.concatenate([rows] * seeds), np.repeat(range(seeds), len(rows))
    rng = np.random.default_rng(seed)
    logs = expand(rows, terms(rows.shape[1])[1:]) @ truth + spread * rng.standard_normal(len(rows))
    runs = [Outcome(int(s), math.exp(min(y, cut)), bool(y < cut)) for s, y in zip(blocks, logs)]
    return fit(METHODS[: rows.shape[1]], rows, runs)


def coefficients(mains, **pairs):
    """β of five methods and γ by name: ab=.1."""
    return np.array([*mains, *(pairs.get("".join(METHODS[i] for i in term), 0.0) for term in MODEL[5:])])


def test_a_clear_case():
    found = best(study(coefficients([-0.3, -0.2, 0.2, -0.1, 0.1], ab=0.4), spread=0.01))
    assert found.composition == ("a", "d") and found.probability > 0.99 and found.drop == ()
    assert found.speed_up.low < math.exp(0.4) < found.speed_up.high
    assert found.removal["d"].estimate == pytest.approx(math.exp(0.1), rel=0.02)


def test_shares_multiply_to_the_speed_up_and_are_shapleys():
    fitted = study(coefficients([-0.3, -0.2, -0.1, 0.3, 0.3], ab=0.1, bc=-0.1, ac=-0.05), spread=0.02)
    found = best(fitted)
    assert found.composition == ("a", "b", "c")
    assert math.prod(share.estimate for share in found.shares.values()) == pytest.approx(
        found.speed_up.estimate
    )
    mean, _ = posterior(fitted)
    orders = list(permutations(range(3)))
    for i, name in enumerate("abc"):
        gains = []
        for order in orders:
            before = np.isin(range(5), order[: order.index(i)]).astype(int)
            after = before + (np.arange(5) == i)
            gains.append((expand(np.array([after, before]), MODEL) @ mean) @ [1, -1])
        assert found.shares[name].estimate == pytest.approx(math.exp(-np.mean(gains)))


def test_what_costs_nothing_known_may_be_dropped():
    found = best(study(coefficients([-0.3, -0.2, -0.01, 0.2, 0.2]), seed=1))
    assert set(found.composition) >= {"a", "b"} and set(found.drop) == set(found.composition) - {"a", "b"}


def test_only_what_is_allowed_is_recommended():
    truth = coefficients([-0.3, -0.2, -0.1, 0.1, 0.1])
    assert best(study(truth, spread=0.02)).composition == ("a", "b", "c")
    allowed = best(study(truth, spread=0.02), lambda composition: not {"a", "b"} <= set(composition))
    assert allowed.composition == ("a", "c")
    with pytest.raises(ValueError, match="none of the 32 compositions of a, b, c, d, e is allowed"):
        best(study(truth), lambda composition: False)


def test_no_spread_and_too_many_methods_are_refused():
    with pytest.raises(ValueError, match="3 runs leave no spread to judge by; add a seed"):
        best(study(np.array([-0.1, 0.1, 0.0]), seeds=1, rows=alone("ab").rows))
    with pytest.raises(ValueError, match="study at most 12 methods"):
        rows = np.eye(13, dtype=int)
        best(fit([f"m{i}" for i in range(13)], rows, [Outcome(0, 1.0 + i) for i in range(13)], pairs=False))


def test_a_pair_that_always_misses_is_not_recommended():
    """Left out of the fit, its runs would leave each of the two looking good, and so both together."""
    truth = coefficients([-0.3, -0.2, -0.1, 0.1, 0.1], ab=2.0)
    found = best(study(truth, cut=0.5, spread=0.05))
    assert not {"a", "b"} <= set(found.composition) and "c" in found.composition


def test_with_misses_and_without_it_is_the_same_posterior():
    fitted = study(coefficients([-0.3, -0.2, -0.1, 0.1, 0.1], ab=0.1))
    for one, other in zip(_given_times(fitted), _given_misses(fitted)):
        assert one.mean == pytest.approx(other.mean, abs=1e-4) and one.degrees == other.degrees
        assert one.root @ one.root.T == pytest.approx(other.root @ other.root.T, rel=0.02, abs=1e-5)
    logs = np.array([[one.log_evidence for one in g(fitted)] for g in (_given_times, _given_misses)])
    assert logs[0] - logs[0].max() == pytest.approx(logs[1] - logs[1].max(), abs=0.05)


@pytest.mark.slow
def test_it_picks_the_best_more_often_than_other_rules():
    """β ~ N(−.05, .1), γ nil, sparse or everywhere: against least squares, and what helps alone (equal runs)."""
    rng, draws, won = np.random.default_rng(0), 120, []
    print("\nγ sd, share, seeds, run sd: P(best) averaged, least squares, alone | excess log time | coverage")
    for size, share in ((0.0, 0.0), (0.05, 0.3), (0.05, 1.0), (0.1, 0.3)):
        for seeds, spread in ((1, 0.07), (2, 0.07), (2, 0.02)):
            excess, covered = np.zeros((draws, 3)), 0
            for draw in range(draws):
                gamma = rng.normal(0, size, 10) * (rng.random(10) < share)
                truth = np.append(rng.normal(-0.05, 0.1, 5), gamma)
                surface = expand(ALL, MODEL) @ truth
                fitted = study(truth, seeds, spread, seed=draw)
                found = best(fitted)
                helps = _helping_alone(truth, round(16 * seeds / 6), spread, rng)
                picked = [
                    surface[_place(found.composition)],
                    surface[np.argmin(expand(ALL, MODEL) @ fitted.estimate.coefficients)],
                    surface[_place(helps)],
                ]
                covered += found.speed_up.low <= math.exp(-picked[0]) <= found.speed_up.high
                excess[draw] = np.array(picked) - surface.min()
            right = (excess < 1e-12).mean(0)
            print(
                size, share, seeds, spread, right.round(3), excess.mean(0).round(4), round(covered / draws, 3)
            )
            won.append((*right, *excess.mean(0)))
    mean = np.mean(won, axis=0)
    print("mean", mean.round(4))
    assert mean[0] > mean[1] + 0.03 and mean[0] > mean[2] + 0.1
    assert mean[3] < 0.8 * mean[4] and mean[3] < 0.5 * mean[5]


def _place(composition):
    return int(np.flatnonzero(([name in composition for name in METHODS] == ALL).all(1))[0])


def _helping_alone(truth, seeds, spread, rng):
    """The methods that came out faster than the baseline, one at a time."""
    errors = rng.normal(0, spread / math.sqrt(seeds), 6)
    return [name for name, value in zip(METHODS, truth[:5] + errors[1:] - errors[0]) if value < 0]


def test_eight_methods_are_searched_in_a_second():
    methods = [f"m{i}" for i in range(8)]
    rows = fraction(methods, 2).rows
    logs = rows @ np.linspace(-0.2, 0.15, 8) + 0.05 * np.random.default_rng(0).standard_normal(len(rows))
    found = best(fit(methods, rows, [Outcome(0, math.exp(y)) for y in logs]))
    assert found.composition[:4] == ("m0", "m1", "m2", "m3")
