"""Power as simulated, the published tables of seeds and boundaries, and Holm by hand."""

import math

import numpy as np
import pytest
from scipy import special

from stretto.measure.power import holm, interim_levels, power, seeds_needed


@pytest.mark.parametrize(
    "sd, effect, seeds",
    [(0.02, 0.05, 4), (0.02, 0.1, 3), (0.02, 0.2, 3), (0.07, 0.05, 34), (0.07, 0.1, 10), (0.07, 0.2, 4)],
)
def test_seeds_needed_equals_the_published_table(sd, effect, seeds):
    assert seeds_needed(effect, sd) == seeds
    assert power(effect, sd, seeds) >= 0.8 and (seeds == 3 or power(effect, sd, seeds - 1) < 0.8)


def test_no_spread_and_much_and_nonsense():
    assert seeds_needed(0.05, 0.0) == 3 and power(0.05, 0.0, 2) == 1
    assert seeds_needed(0.01, 1.0) == pytest.approx(2 * (1.96 + 0.8416) ** 2 / math.log(1.01) ** 2, rel=5e-3)
    for effect, sd, seeds in ((0.0, 0.1, 3), (0.1, -1.0, 3), (0.1, 0.1, 1)):
        with pytest.raises(ValueError, match="effect above 0"):
            power(effect, sd, seeds)


@pytest.mark.parametrize(
    "sd, effect, seeds", [(0.02, 0.05, 4), (0.07, 0.1, 5), (0.07, 0.1, 10), (0.07, 0.2, 4)]
)
def test_simulated_power_is_within_two_points(sd, effect, seeds):
    rng = np.random.default_rng(4)
    base, other = rng.normal(0, sd, (2, 20_000, seeds))
    difference = base.mean(1) - other.mean(1) + math.log1p(effect)
    shares = base.var(1, ddof=1) / seeds, other.var(1, ddof=1) / seeds
    error = np.sqrt(sum(shares))
    resolved = np.abs(difference) > special.stdtrit(2 * seeds - 2, 0.975) * error
    assert resolved.mean() == pytest.approx(power(effect, sd, seeds), abs=0.02)
    welch = error**4 * (seeds - 1) / sum(share**2 for share in shares)
    resolved = np.abs(difference) > special.stdtrit(welch, 0.975) * error
    assert resolved.mean() == pytest.approx(power(effect, sd, seeds), abs=0.02 if seeds > 5 else 0.045)


@pytest.mark.parametrize("sd, effect, seeds", [(0.02, 0.05, 4), (0.07, 0.1, 5), (0.07, 0.1, 10)])
def test_simulated_power_of_pairs_is_within_two_points(sd, effect, seeds):
    """What a seed does to both arms cancels, and half of the degrees of freedom with it."""
    rng = np.random.default_rng(5)
    own, shared = rng.normal(0, sd, (2, 20_000, seeds)), rng.normal(0, 5 * sd, (20_000, seeds))
    base, other = own + shared
    pairs = base - other + math.log1p(effect)
    reach = special.stdtrit(seeds - 1, 0.975) * pairs.std(1, ddof=1) / math.sqrt(seeds)
    resolved = np.abs(pairs.mean(1)) > reach
    assert resolved.mean() == pytest.approx(power(effect, sd, seeds, paired=True), abs=0.02)
    assert power(effect, sd, seeds, paired=True) < power(effect, sd, seeds)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0] and holm([]) == []


def test_interim_looks_equal_the_published_boundaries():
    limits = -special.ndtri(np.array(interim_levels([0.2, 0.4, 0.6, 0.8, 1.0])) / 2)
    assert limits == pytest.approx(
        [4.8769, 3.3569, 2.6803, 2.2898, 2.0310], abs=2e-4
    )  # Reboussin et al. 2000
    assert interim_levels([1.0], 0.1) == pytest.approx([0.1])


def test_interim_looks_err_as_often_as_they_say():
    looks = np.array([0.3, 0.5, 1.0])
    steps = np.random.default_rng(5).normal(size=(100_000, 3)) * np.sqrt(np.diff(looks, prepend=0))
    scores = np.abs(steps.cumsum(1) / np.sqrt(looks))
    stopped = (2 * special.ndtr(-scores) < interim_levels(looks.tolist())).any(1)
    assert stopped.mean() == pytest.approx(0.05, abs=0.003)


@pytest.mark.parametrize("looks", [[], [0.5, 0.5], [0.0, 1.0], [1.0, 0.5], [0.5, 1.2]])
def test_looks_that_do_not_rise_to_one_are_refused(looks):
    with pytest.raises(ValueError, match="rising shares"):
        interim_levels(looks)
