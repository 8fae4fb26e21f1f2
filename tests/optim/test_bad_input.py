"""What the Shampoo family refuses: each message has the value, the range and a way out."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from stretto.optim import SOAP, KLShampoo, Muon, NorMuon, OneSidedShampoo, SOAPMuon
from stretto.optim.regions import DIRECTIONS
from stretto.optim.shampoo import CHOICES, LEAST, Shampoo

PRESETS = [Shampoo, SOAP, KLShampoo, OneSidedShampoo, Muon, NorMuon, SOAPMuon]


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize("make", PRESETS)
def test_only_the_rate_is_required(make: Any) -> None:
    """And nothing warns."""
    required = [
        name
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    assert required == ["params", "lr"]
    weights = params()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make(weights, 0.1)
        for _ in range(3):
            for p in weights:
                p.grad = torch.randn_like(p)
            optimizer.step()
    assert all(p.isfinite().all() for p in weights)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_listed(name: str) -> None:
    listed = ", ".join(map(repr, CHOICES[name])).replace("(", r"\(")
    with pytest.raises(ValueError, match=f"{name} is 'nonsense'; it must be one of {listed}"):
        Shampoo(params(), 0.1, **{name: "nonsense"})


@pytest.mark.parametrize("name", LEAST)
def test_every_lower_bound_is_said(name: str) -> None:
    bad = LEAST[name] - 1
    with pytest.raises(ValueError, match=f"^{name} is {bad}; it must be {LEAST[name]} or more"):
        Shampoo(params(), 0.1, **{name: bad})
    with pytest.raises(ValueError, match=f"^{name} is nan; it must be {LEAST[name]} or more"):
        Shampoo(params(), 0.1, **{name: float("nan")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1; it must be 0 or more"),
        ({"lr": float("nan")}, "lr is nan; it must be 0 or more"),
        ({"betas": (-0.1, 0.9)}, r"beta1 is -0.1; it must lie in \[0, 1\)"),
        ({"betas": (1.0, 0.9)}, r"beta1 is 1.0; it must lie in \[0, 1\)"),
        ({"betas": (float("nan"), 0.9)}, r"beta1 is nan; it must lie in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"beta2 is -0.1; it must lie in \[0, 1\]"),
        ({"betas": (0.9, 1.1)}, r"beta2 is 1.1; it must lie in \[0, 1\]"),
        ({"betas": (0.9, 1.0), "direction": "soap"}, "beta2 is 1; soap .* below 1"),
        ({"graft_beta2": 1.1}, r"graft_beta2 is 1.1; it must lie in \[0, 1\]"),
        ({"graft_beta2": -0.1}, r"graft_beta2 is -0.1; it must lie in \[0, 1\]"),
        ({"beta3": 1.5}, r"beta3 is 1.5; it must lie in \[0, 1\]"),
        ({"beta3": 0.5, "betas": (0.0, 0.9)}, "beta3 is 0.5 and beta1 is 0; beta3 mixes into a momentum"),
        ({"momentum": 1.0}, r"momentum is 1.0; it must lie in \[0, 1\)"),
        ({"momentum": -0.5}, r"momentum is -0.5; it must lie in \[0, 1\)"),
        ({"neuron_beta2": 1.0}, r"neuron_beta2 is 1.0; it must lie in \[0, 1\)"),
        ({"clip": 0.0}, "clip is 0.0; it must be above 0, or None"),
        ({"clip": -1.0}, "clip is -1.0; it must be above 0, or None"),
        ({"max_skips": 0}, "max_skips is 0; it must be 1 or more"),
        ({"split": 3}, r"split is 3; it must divide the first dimension of parameter 0, .* \(4, 3\)"),
        ({"direction": "soap", "graft": "adam"}, "graft is 'adam'; soap is Adam's step .* None or 'sgd'"),
        ({"direction": "spectral", "graft": "sgd"}, "graft is 'sgd'; spectral .* leave graft out"),
        ({"direction": "soap", "root": "newton"}, "root is 'newton'; soap keeps bases, which eigh and qr"),
        ({"direction": "eigen", "root": "denman_beavers"}, "root is 'denman_beavers'; eigen keeps bases"),
        ({"root": "newton", "ridge": "pinv"}, "ridge is 'pinv'; newton .* choose root='eigh'"),
        ({"root": "eigh", "tolerance": 0.1}, "tolerance is 0.1; it needs a basis .* choose root='qr'"),
    ],
)
def test_every_range_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Shampoo(params(), **{"lr": 0.1, **options})


def test_an_unknown_direction_is_answered_with_all_of_them() -> None:
    with pytest.raises(ValueError, match="direction is 'sopa'; it must be one of") as raised:
        Shampoo(params(), 0.1, direction="sopa")
    assert all(repr(direction) in str(raised.value) for direction in DIRECTIONS)


def test_a_bad_group_is_refused_and_the_others_stay() -> None:
    """Added later it leaves no trace; the next steps are those of before."""
    weights, more = params(), params()
    optimizer = Shampoo(weights, 0.1, every=1)
    with pytest.raises(ValueError, match="block is 0; it must be 1 or more"):
        optimizer.add_param_group({"params": more, "block": 0})
    with pytest.raises(ValueError, match="split is 5; it must divide the first dimension of parameter 2"):
        optimizer.add_param_group({"params": more, "split": 5})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.layout) == 2
    optimizer.add_param_group({"params": more})
    assert len(optimizer.layout) == 4
    for p in weights + more:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, q in zip(weights, more):
        assert torch.equal(p, q)


def refused(weights: list[nn.Parameter], optimizer: Shampoo, message: str) -> None:
    before = [p.detach().clone() for p in weights]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(weights, before))
    assert not optimizer.state
    assert optimizer.param_groups[0]["calls"] == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sparse_gradients_are_refused_by_name(direction: str) -> None:
    table = nn.Embedding(6, 3, sparse=True)
    optimizer = Shampoo(table.named_parameters(), 0.1, direction=direction)
    table(torch.tensor([1, 2])).sum().backward()
    refused([table.weight], optimizer, "the gradient of weight is sparse; .* ask its layer for dense")


def test_complex_gradients_are_refused_by_name() -> None:
    weights = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))]
    optimizer = Shampoo(weights, 0.1)
    for p in weights:
        p.grad = torch.ones_like(p)
    refused(weights, optimizer, "the gradient of parameter 1 is complex; .* to another optimizer")


def test_no_parameters_and_no_rate_are_errors() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        Shampoo([], 0.1)
    with pytest.raises(TypeError, match="lr"):
        Shampoo(params())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="nonsense"):
        Shampoo(params(), 0.1, nonsense=1)  # type: ignore[call-arg]
