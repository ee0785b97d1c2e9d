"""Norms, the gate and the MLP: by hand, and what they round to. Formulas: test_modules.py; an MLP without up projection: test_clip_builders.py."""

import copy
import math

import pytest
import torch
from numerics import assert_no_worse
from torch import nn

from fastfuse.modules import FeedForward, Fp32LayerNorm, RMSNorm, TanhGate, rms_norm


def test_a_fresh_gate_is_closed():
    assert TanhGate().scale.tolist() == [0.0] and not TanhGate()(torch.randn(3, 4)).any()


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
    x, norm = torch.randn(64, 32).bfloat16(), RMSNorm(32).bfloat16()
    scale = nn.init.uniform_(norm.scale, 0.5, 1.5)
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
    gate, down, up = (nn.Linear(2, 2) for _ in range(3))
    mlp = FeedForward(gate_proj=gate, down_proj=down, up_proj=up)
    assert mlp.w1 is gate and mlp.w2 is down and mlp.w3 is up
