"""Gradient clipping, against torch's own."""

import pytest
import torch
from torch import nn

from stretto.core import At
from stretto.methods import GradientClipping
from stretto.methods.gradient_clipping import clip_by_norm


def _model(scale, dtype=torch.float32):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(dtype) * scale
    return model


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_as_torch_does(scale, dtype):
    ours, theirs = _model(scale, dtype), _model(scale, dtype)
    total = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    mine = clip_by_norm([p.grad for p in ours.parameters()], 1.0)
    rough = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(mine.double(), total.double(), **rough)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, **rough)


def test_by_hand():
    gradients = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    assert clip_by_norm(gradients, 1.0) == 5
    torch.testing.assert_close(torch.cat([g.flatten() for g in gradients]), torch.tensor([0.6, 0, 0.8]))


def test_small_gradients_keep_their_bits():
    model = _model(0.01)
    before = [p.grad.clone() for p in model.parameters()]
    GradientClipping(1.0).gradients(model, At(0, 1, 0, 0, 1), {})
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before))


def test_frozen_and_unused_parameters_are_passed_over():
    model = _model(100.0)
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = None
    GradientClipping(2.0).gradients(model, At(0, 1, 0, 0, 1), {})
    rest = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert rest.norm() == pytest.approx(2.0, rel=1e-5)
    for p in model.parameters():
        p.grad = None
    GradientClipping(2.0).gradients(model, At(0, 1, 0, 0, 1), {})


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_a_norm_not_above_zero_is_refused(norm):
    with pytest.raises(ValueError, match="must be above 0"):
        GradientClipping(norm)
