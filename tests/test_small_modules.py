"""Norms, the gate, the MLP and the tied projection."""

import copy
import math

import pytest
import reference
import torch
from numerics import assert_no_worse
from reference import DTYPES, assert_matches, make_mlp, shaken
from torch import nn
from torch.nn import functional as F

from fastfuse.modules import FeedForward, Fp32LayerNorm, RMSNorm, TanhGate, TiedLinear, rms_norm


def test_a_fresh_gate_is_closed():
    gate = TanhGate()
    assert {n: p.tolist() for n, p in gate.state_dict().items()} == {"scale": [0.0]}
    assert torch.equal(gate(torch.randn(3, 4)), torch.zeros(3, 4))


def test_the_gate_multiplies_by_tanh():
    gate = TanhGate()
    gate.scale.data.fill_(1.5)
    assert gate.double()(torch.tensor([2.0], dtype=torch.float64)).item() == pytest.approx(2 * math.tanh(1.5), rel=1e-15)
    assert gate(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(0.9051482536448664, rel=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_forward_and_gradients(dtype):
    assert_matches(shaken(TanhGate()), lambda m, x: m(x), lambda m, x: x * torch.tanh(m.scale), {"x": torch.randn(3, 5)}, dtype)


def test_a_closed_gate_passes_a_gradient_to_its_scale_alone():
    gate, x, g = TanhGate(), torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    gate(x).backward(g)
    assert not x.grad.any()
    assert_no_worse(gate.scale.grad, (g * x).sum()[None], (g.double() * x.double()).sum()[None])


@pytest.mark.parametrize(("x", "scale", "out"), [("bfloat16", "float32", "float32"), ("bfloat16", "bfloat16", "bfloat16"), ("float64", "float32", "float64")])
def test_gate_and_rms_norm_return_the_wider_dtype(x, scale, out):
    x, scale, out = (getattr(torch, name) for name in (x, scale, out))
    for module in (TanhGate(), RMSNorm(4)):
        assert module.to(scale)(torch.randn(2, 4, dtype=x)).dtype == out


def test_rms_norm_by_hand():
    """The mean square of 3, 4, 0, 0 is 6.25."""
    norm = RMSNorm(4, eps=0.0).double()
    norm.scale.data.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert norm(torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64)).tolist() == pytest.approx([1.2, 3.2, 0.0, 0.0], rel=1e-15)


@pytest.mark.parametrize(("kwargs", "eps"), [({}, 1e-6), ({"eps": 1e-5}, 1e-5), ({"eps": 0.5}, 0.5)])
def test_eps_is_added_to_the_mean_square(kwargs, eps):
    """An input whose mean square is eps itself shrinks by sqrt(2)."""
    x = torch.full((1, 4), math.sqrt(eps), dtype=torch.float64)
    for out in (RMSNorm(4, **kwargs).double()(x), rms_norm(x, **kwargs)):
        assert out.tolist()[0] == pytest.approx([math.sqrt(0.5)] * 4, rel=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_forward_and_gradients(dtype):
    norm = shaken(RMSNorm(8, eps=1e-5))
    assert_matches(norm, lambda m, x: m(x), lambda m, x: reference.rms(x, m.scale, 1e-5), {"x": torch.randn(2, 3, 8)}, dtype)


def test_rms_norm_rounds_after_the_norm_and_after_the_scale():
    x, scale = torch.randn(64, 32).bfloat16(), (torch.rand(32) + 0.5).bfloat16()
    norm = RMSNorm(32).bfloat16()
    norm.scale.data.copy_(scale)
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    rounded_once = (normed * scale.float()).bfloat16()
    assert not torch.equal(normed.bfloat16() * scale, rounded_once), "the input must tell the two orders apart"
    assert torch.equal(norm(x), normed.bfloat16() * scale)
    assert torch.equal(rms_norm(x), normed.bfloat16())


def test_rms_norm_of_fp16_with_an_fp32_scale_is_fp32():
    x = torch.randn(4, 8).half()
    out = RMSNorm(8)(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, rms_norm(x).float())


def test_norms_survive_values_whose_squares_overflow_fp16():
    x = torch.tensor([[1000.0, -2000.0, 3000.0, 4000.0]])
    for norm in (RMSNorm(4).half(), Fp32LayerNorm(4).half()):
        exact = copy.deepcopy(norm).double()(x.double())
        assert_no_worse(norm(x.half()), exact.half(), exact)


def test_rms_norm_reads_the_last_dim_alone():
    x = torch.randn(3, 2, 8)
    assert torch.equal(RMSNorm(8)(x)[1, 1], RMSNorm(8)(x[1, 1]))
    assert RMSNorm(8).normalized_shape == (8,)
    assert list(RMSNorm(8).state_dict()) == ["scale"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_computes_in_fp32(dtype):
    norm = Fp32LayerNorm(16).to(dtype)
    norm.weight.data.copy_(torch.rand(16) + 0.5)
    norm.bias.data.copy_(torch.randn(16))
    x = torch.randn(5, 16).to(dtype)
    assert isinstance(norm, nn.LayerNorm) and list(norm.state_dict()) == ["weight", "bias"]
    assert torch.equal(norm(x), F.layer_norm(x.float(), (16,), norm.weight.float(), norm.bias.float(), 1e-5).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_forward_and_gradients(dtype):
    def formula(m, x):
        w = reference.wide(x)
        centred = w - w.mean(-1, keepdim=True)
        return (centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-3) * m.weight + m.bias).to(x.dtype)

    norm = Fp32LayerNorm(8, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    assert_matches(norm, lambda m, x: m(x), formula, {"x": torch.randn(2, 3, 8)}, dtype)


def test_layer_norm_without_weight_or_bias():
    x = torch.randn(3, 8).bfloat16()
    assert torch.equal(Fp32LayerNorm(8, elementwise_affine=False)(x), F.layer_norm(x.float(), (8,)).bfloat16())
    norm = Fp32LayerNorm(8, bias=False)
    nn.init.normal_(norm.weight)
    assert list(norm.state_dict()) == ["weight"]
    assert torch.equal(norm(x), F.layer_norm(x.float(), (8,), norm.weight).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlp_forward_and_gradients(dtype):
    assert_matches(shaken(make_mlp()), lambda m, x: m(x), reference.mlp, {"x": torch.randn(2, 3, reference.D)}, dtype)


def test_the_gate_projection_is_w1_and_the_up_projection_w3():
    one = [nn.Linear(1, 1, bias=False).double() for _ in range(3)]
    for m, value in zip(one, (2.0, 5.0, 3.0), strict=True):
        nn.init.constant_(m.weight, value)
    mlp = FeedForward(gate_proj=one[0], down_proj=one[1], up_proj=one[2])
    assert {n: p.item() for n, p in mlp.state_dict().items()} == {"w1.weight": 2.0, "w2.weight": 5.0, "w3.weight": 3.0}
    silu = 2 / (1 + math.exp(-2))
    assert mlp(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(5 * silu * 3, rel=1e-14)


def test_mlp_without_an_up_projection():
    gate, down = nn.Linear(4, 6), nn.Linear(6, 4)
    mlp = FeedForward(gate_proj=gate, down_proj=down, activation=nn.GELU())
    x = torch.randn(3, 4)
    assert mlp.w3 is None and list(mlp.state_dict()) == ["w1.weight", "w1.bias", "w2.weight", "w2.bias"]
    assert torch.equal(mlp(x), F.linear(F.gelu(F.linear(x, gate.weight, gate.bias)), down.weight, down.bias))


def test_tied_linear_reads_the_weight_at_every_call():
    embedding, x = nn.Embedding(7, 4), torch.randn(2, 3, 4)
    tied = TiedLinear(embedding)
    assert torch.equal(tied(x), F.linear(x, embedding.weight))
    embedding.weight = nn.Parameter(torch.randn(7, 4))
    assert torch.equal(tied(x), F.linear(x, embedding.weight))
    tied(x).sum().backward()
    assert_no_worse(embedding.weight.grad, x.sum((0, 1)).expand(7, 4), x.double().sum((0, 1)).expand(7, 4))


def test_tied_linear_is_no_module_and_needs_a_weight():
    assert not isinstance(TiedLinear(nn.Embedding(3, 2)), nn.Module)
    with pytest.raises(AttributeError, match=r"ReLU.*no attribute 'weight'"):
        TiedLinear(nn.ReLU())
