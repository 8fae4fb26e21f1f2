"""What draws the trials of a tuning from search spaces: evenly, or near what did well (optuna, an extra)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from stretto.methods._spaces import Space

STARTUP = 5  # trials that TPE draws evenly before it models
Values = dict[str, Any]  # by "method.field"


class Sampler(Protocol):
    """Draws values, one trial after the other; equal answers are followed by equal draws."""

    def ask(self) -> Values:
        """The values of the next trial."""

    def tell(self, loss: float) -> None:
        """How the trial asked for last came out: less is better, infinite where it failed."""


class QuasiRandom:
    """Halton's sequence, scrambled: even in every field alone, and of n trials the first are those of fewer."""

    def __init__(self, spaces: Sequence[Space]) -> None:
        from scipy.stats import qmc

        self.spaces = spaces
        self.points = qmc.Halton(len(spaces), rng=np.random.default_rng(0))

    def ask(self) -> Values:
        """The next point."""
        point = self.points.random(1)[0].tolist()
        return {space.name: space.at(share) for space, share in zip(self.spaces, point)}

    def tell(self, loss: float) -> None:
        """It does not listen."""


class TPE:
    """optuna's tree of Parzen estimators: draws where earlier trials of the smallest budget did well."""

    def __init__(self, spaces: Sequence[Space]) -> None:
        try:
            import optuna
        except ImportError:
            raise ValueError("the sampler optuna is not installed; pip install 'stretto[tune]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.spaces = spaces
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=STARTUP)
        self.study = optuna.create_study(sampler=sampler)
        self.distributions = {space.name: _distribution(space) for space in spaces}

    def ask(self) -> Values:
        """The next trial's values."""
        self.trial = self.study.ask(self.distributions)
        drawn = self.trial.params
        return {s.name: drawn[s.name] if s.scale == "choice" else s.near(drawn[s.name]) for s in self.spaces}

    def tell(self, loss: float) -> None:
        """Its outcome."""
        self.study.tell(self.trial, loss)


def _distribution(space: Space) -> Any:
    from optuna import distributions

    if space.scale == "choice":
        return distributions.CategoricalDistribution(space.ends)
    kind = distributions.IntDistribution if space.whole else distributions.FloatDistribution
    low, high = space.ends
    return kind(low, high, log=space.scale == "log")


SAMPLERS: dict[str, type[QuasiRandom] | type[TPE]] = {"random": QuasiRandom, "optuna": TPE}
