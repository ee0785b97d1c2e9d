"""Norms, the gate, the MLP and the tied projection: by hand, and what they round to. Formulas: test_modules.py."""

import copy
import math

import pytest
import torch
from numerics import assert_no_worse
from torch import nn
from torch.nn import functional as F

from fastfuse.modules import FeedForward, Fp32LayerNorm, RMSNorm, TanhGate, TiedLinear, rms_norm


def test_a_fresh_gate_is_closed():
    """It passes a gradient to its scale alone."""
    gate, x, g = TanhGate(), torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    assert gate.scale.tolist() == [0.0] and torch.equal(gate(x), torch.zeros(3, 4))
    gate(x).backward(g)
    assert not x.grad.any()
    assert_no_worse(gate.scale.grad, (g * x).sum()[None], (g.double() * x.double()).sum()[None])


@pytest.mark.parametrize(("x", "scale", "out"), [("bfloat16", "float32", "float32"), ("float16", "float16", "float16"), ("float64", "float32", "float64")])
def test_gate_and_rms_norm_return_the_wider_dtype(x, scale, out):
    x, scale, out = (getattr(torch, name) for name in (x, scale, out))
    for module in (TanhGate(), RMSNorm(4)):
        assert module.to(scale)(torch.randn(2, 4, dtype=x)).dtype == out


@pytest.mark.parametrize(("kwargs", "eps"), [({}, 1e-6), ({"eps": 1e-5}, 1e-5), ({"eps": 0.5}, 0.5)])
def test_eps_is_added_to_the_mean_square(kwargs, eps):
    """An input whose mean square is eps itself shrinks by sqrt(2)."""
    x = torch.full((1, 4), math.sqrt(eps), dtype=torch.float64)
    for out in (RMSNorm(4, **kwargs).double()(x), rms_norm(x, **kwargs)):
        assert out.tolist()[0] == pytest.approx([math.sqrt(0.5)] * 4, rel=1e-14)


def test_rms_norm_rounds_after_the_norm_and_after_the_scale():
    x, scale = torch.randn(64, 32).bfloat16(), (torch.rand(32) + 0.5).bfloat16()
    norm = RMSNorm(32).bfloat16()
    norm.scale.data.copy_(scale)
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert not torch.equal(normed.bfloat16() * scale, (normed * scale.float()).bfloat16()), "the input must tell the two orders apart"
    assert torch.equal(norm(x), normed.bfloat16() * scale) and torch.equal(rms_norm(x), normed.bfloat16())
    assert torch.equal(RMSNorm(32)(x), rms_norm(x).float()), "of an fp32 scale the result is fp32"


def test_norms_survive_values_whose_squares_overflow_fp16():
    x = torch.tensor([[1000.0, -2000.0, 3000.0, 4000.0]])
    for norm in (RMSNorm(4).half(), Fp32LayerNorm(4).half()):
        exact = copy.deepcopy(norm).double()(x.double())
        assert_no_worse(norm(x.half()), exact.half(), exact)
        assert norm.normalized_shape == (4,)
    assert isinstance(norm, nn.LayerNorm)


def test_the_gate_projection_is_w1_and_the_up_projection_w3():
    one = [nn.Linear(1, 1, bias=False).double() for _ in range(3)]
    for m, value in zip(one, (2.0, 5.0, 3.0), strict=True):
        nn.init.constant_(m.weight, value)
    mlp = FeedForward(gate_proj=one[0], down_proj=one[1], up_proj=one[2])
    assert [p.item() for p in (mlp.w1.weight, mlp.w2.weight, mlp.w3.weight)] == [2.0, 5.0, 3.0]
    assert mlp(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(5 * 2 / (1 + math.exp(-2)) * 3, rel=1e-14)


def test_mlp_without_an_up_projection():
    gate, down, x = nn.Linear(4, 6), nn.Linear(6, 4), torch.randn(3, 4)
    mlp = FeedForward(gate_proj=gate, down_proj=down, activation=nn.GELU())
    assert mlp.w3 is None and list(mlp.state_dict()) == ["w1.weight", "w1.bias", "w2.weight", "w2.bias"]
    assert torch.equal(mlp(x), F.linear(F.gelu(F.linear(x, gate.weight, gate.bias)), down.weight, down.bias))


def test_tied_linear_reads_the_weight_at_every_call():
    embedding, x = nn.Embedding(7, 4), torch.randn(2, 3, 4)
    tied = TiedLinear(embedding)
    assert not isinstance(tied, nn.Module) and torch.equal(tied(x), F.linear(x, embedding.weight))
    embedding.weight = nn.Parameter(torch.randn(7, 4))
    assert torch.equal(tied(x), F.linear(x, embedding.weight))
    tied(x).sum().backward()
    assert_no_worse(embedding.weight.grad, x.sum((0, 1)).expand(7, 4), x.double().sum((0, 1)).expand(7, 4))
