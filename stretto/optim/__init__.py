"""Optimizers usable by anyone, without the rest of stretto."""

from stretto.optim.muon import Muon

__all__ = ["Muon"]
