"""The tolerance itself: correct sums pass in any order, and results that are a little wrong do not."""

import pytest
import torch
from numerics import in_several_orders, worse_than_eager
from reference import assert_gradients_no_worse
from torch.nn import functional as F
from weights import quantize, random_weight

from fastfuse.ops import nf4_dequantize
from fastfuse.quant.nf4 import NF4View

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 65, 192), (3, 65, 192), (33, 64, 576), (16, 256, 128)]


def product(x, w):
    """A correct product that shares no code with PyTorch's: fp32 sums, the terms one after the other, rounded once."""
    out = torch.zeros(x.shape[0], w.shape[0])
    for k in range(x.shape[1]):
        out = torch.addcmul(out, x[:, k, None].float(), w[None, :, k].float())
    return out.to(x.dtype)


def summed_in_16_bits(x, w):
    """As a kernel whose accumulator is of the result's dtype."""
    wide = torch.float16 if x.dtype == torch.float32 else x.dtype
    out = torch.zeros(x.shape[0], w.shape[0], dtype=wide)
    for k in range(x.shape[1]):
        out = (out.float() + x[:, k, None].float() * w[None, :, k].float()).to(wide)
    return out.to(x.dtype)


def one_wrong_scale(weight):
    """One block of 64 has the scale of its neighbour."""
    view = NF4View.of(weight)
    absmax = view.scales[0].clone()
    block = (absmax[1:] - absmax[:-1]).abs().argmax()
    absmax[block] = absmax[block + 1]
    return nf4_dequantize(NF4View(view.packed, view.code, (absmax,), view.block_size, view.shape, view.dtype))


@pytest.fixture(params=[(shape, dtype) for shape in SHAPES for dtype in DTYPES], ids=str)
def drawn(request):
    (M, N, K), dtype = request.param
    weight = quantize(random_weight(N, K, torch.float32), "flat")
    return torch.randn(M, K).to(dtype), weight


def judged(x, weight, result):
    w = nf4_dequantize(weight)
    return worse_than_eager(result, in_several_orders(lambda: F.linear(x, w.to(x.dtype))), x.double() @ w.to(x.dtype).double().T)


def test_a_correct_product_passes(drawn):
    x, weight = drawn
    assert judged(x, weight, product(x, nf4_dequantize(weight).to(x.dtype))) is None


def test_one_wrong_scale_is_caught(drawn):
    x, weight = drawn
    assert judged(x, weight, product(x, one_wrong_scale(weight).to(x.dtype))) is not None


@pytest.mark.parametrize("tile", [16, 32])
def test_a_lost_tile_of_K_is_caught(drawn, tile):
    x, weight = drawn
    assert judged(x, weight, product(x[:, tile:], nf4_dequantize(weight).to(x.dtype)[:, tile:])) is not None


def test_a_sum_in_16_bits_is_caught(drawn):
    """By one input of four at least: with M = 1 few numbers are large, and the worst of a few may be right by luck."""
    x, weight = drawn
    w = nf4_dequantize(weight).to(x.dtype)
    assert any(judged(x, weight, summed_in_16_bits(x, w)) for x in (x, *torch.randn(3, *x.shape).to(x.dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_by_one_wrong_scale_is_caught(dtype):
    """Beside gradients that are right, and have the larger relative errors that the rule for gradients allows."""
    weight = quantize(random_weight(64, 192, torch.float32), "flat")
    x, bias = (torch.randn(n, dtype=dtype) for n in ((9, 192), (64,)))
    dys = [torch.randn(9, 64, dtype=torch.float64).to(dtype) for _ in range(4)]

    def gradients(w, to):
        leaves = {"x": x.to(to).requires_grad_(), "bias": bias.to(to).requires_grad_()}
        y = F.linear(leaves["x"], w.to(dtype).to(to), leaves["bias"])
        draws = [torch.autograd.grad(y, leaves.values(), dy.to(to), retain_graph=True) for dy in dys]
        return dict(zip(leaves, zip(*draws, strict=True), strict=True))

    right, wrong = nf4_dequantize(weight), one_wrong_scale(weight)
    eager, exact = in_several_orders(gradients, right, dtype), gradients(right, torch.float64)
    assert_gradients_no_worse(gradients(right, dtype), eager, exact)
    with pytest.raises(AssertionError, match="'x'"):
        assert_gradients_no_worse(gradients(wrong, dtype), eager, exact)
