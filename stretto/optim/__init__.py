"""Optimizers usable by anyone, without the rest of stretto."""

from stretto.optim.averaging import EMANesterov, Lookahead, PrimalAveraging, ScheduleFree
from stretto.optim.cautious import CautiousWeightDecay
from stretto.optim.hyperball import Hyperball
from stretto.optim.lion import Lion
from stretto.optim.shampoo import SOAP, KLShampoo, Muon, NorMuon, OneSidedShampoo, Shampoo, SOAPMuon
from stretto.optim.update_floor import UpdateFloor

__all__ = [
    "SOAP",
    "CautiousWeightDecay",
    "EMANesterov",
    "Hyperball",
    "KLShampoo",
    "Lion",
    "Lookahead",
    "Muon",
    "NorMuon",
    "OneSidedShampoo",
    "PrimalAveraging",
    "SOAPMuon",
    "ScheduleFree",
    "Shampoo",
    "UpdateFloor",
]
