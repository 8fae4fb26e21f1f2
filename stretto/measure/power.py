"""What a number of seeds can resolve, and what many comparisons and interim looks cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def power(effect: float, sd: float, seeds: int, confidence: float = 0.95, paired: bool = False) -> float:
    """Probability that two arms of `seeds` runs resolve a speed-up of 1 + effect; `sd` is that of one log time, less
    what pairing cancels where the runs are paired.

    From the noncentral t: the normal formula promises .80 and delivers .62 to .78 for few seeds. Welch's intervals,
    which allow for unequal sds, deliver up to .04 less than this at 4 seeds, and the same from 10 on.
    """
    from scipy.special import nctdtr, stdtrit

    if not effect > 0 or not sd >= 0 or seeds < 2:
        raise ValueError(
            f"power wants an effect above 0, an sd of at least 0 and 2 seeds, not {effect}, {sd} and {seeds}"
        )
    if sd == 0:
        return 1.0
    degrees, shift = (seeds - 1) * (1 if paired else 2), math.log1p(effect) / (sd * math.sqrt(2 / seeds))
    return 1 - float(nctdtr(degrees, shift, stdtrit(degrees, (1 + confidence) / 2)))


def seeds_needed(
    effect: float,
    sd: float,
    wanted: float = 0.8,
    confidence: float = 0.95,
    least: int = 3,
    paired: bool = False,
) -> int:
    """Seeds in each of two arms to resolve a speed-up of 1 + effect with the power that is wanted."""
    seeds = max(least, 2)
    while power(effect, sd, seeds, confidence, paired) < wanted:
        seeds += max(1, seeds // 1000)  # to 0.1 % where thousands are needed
    return seeds


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that stay honest over all of them together, in the order given. Holm 1979, step-down."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def interim_levels(looks: Sequence[float], level: float = 0.05) -> list[float]:
    """p-values that each look must stay below to stop there, so that all looks together err with `level`.

    looks: the shares of the planned seeds that each has, rising to 1. O'Brien and Fleming's boundary by the alpha
    spending of Lan and DeMets 1983, on either side: little early, nearly all at the end.
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.special import ndtr, ndtri

    if list(looks) != sorted(set(looks)) or not looks or looks[0] <= 0 or looks[-1] > 1:
        raise ValueError(
            f"looks are rising shares of the planned seeds, above 0 and up to 1, not {list(looks)}"
        )
    nodes, weights = np.polynomial.legendre.leggauss(201)
    places, density = np.zeros(1), np.ones(1)  # where the score still is, with what weight
    levels, before, spent = [], 0.0, 0.0
    for look in looks:
        step = math.sqrt(look - before)
        spend = 2 * float(ndtr(ndtri(level / 4) / math.sqrt(look)))  # on one side, up to this look
        limit = brentq(_excess, 0.0, 40.0, (places, density, step, spend - spent))
        levels.append(2 * float(ndtr(-limit / math.sqrt(look))))
        ahead = limit * nodes
        steps = (ahead[:, None] - places) / step
        density = np.exp(-(steps**2) / 2) @ density / (step * math.sqrt(2 * math.pi)) * weights * limit
        places, before, spent = ahead, look, spend
    return levels


def _excess(limit: float, places: Any, density: Any, step: float, spend: float) -> float:
    """Probability that a normal step of this sd takes the score above the limit, less what may be spent on it."""
    from scipy.special import ndtr

    return float(density @ ndtr((places - limit) / step)) - spend
