"""The tolerance itself: correct sums pass in any order, and results that are a little wrong do not."""

import pytest
import torch
from numerics import Orders, worse_than_eager
from reference import DTYPES, assert_gradients_no_worse
from torch.nn import functional as F

from cases.weights import quantize, random_weight
from fastfuse.ops import nf4_dequantize
from fastfuse.quant.nf4 import NF4View

SHAPES = [(1, 65, 192), (3, 65, 192), (33, 64, 576), (16, 256, 128)]


def product(x, w, accumulator=torch.float32):
    """A product that shares no code with PyTorch's: the terms one after the other, rounded to the accumulator's dtype and, once, to the result's."""
    out = torch.zeros(x.shape[0], w.shape[0], dtype=accumulator)
    for k in range(x.shape[1]):
        out = (out.float() + x[:, k, None].float() * w[None, :, k].float()).to(accumulator)
    return out.to(x.dtype)


def summed_in_16_bits(x, w):
    return product(x, w, torch.float16 if x.dtype == torch.float32 else x.dtype)


def one_wrong_scale(weight):
    """One block of 64 has the scale of its neighbour."""
    view = NF4View.of(weight)
    absmax = view.scales[0].clone()
    block = (absmax[1:] - absmax[:-1]).abs().argmax()
    absmax[block] = absmax[block + 1]
    return nf4_dequantize(NF4View(view.packed, view.code, (absmax,), view.block_size, view.shape, view.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_passes_and_what_is_caught(shape, dtype):
    M, N, K = shape
    weight = quantize(random_weight(N, K, torch.float32), "flat")
    w, wrong = (t.to(dtype) for t in (nf4_dequantize(weight), one_wrong_scale(weight)))
    draws = torch.randn(4, M, K).to(dtype)

    def judge(x):
        eager, exact = Orders(F.linear, x, w), x.double() @ w.double().T
        return lambda result: worse_than_eager(result, eager, exact)

    x, *more = draws
    judged = judge(x)
    assert judged(product(x, w)) is None
    assert judged(product(x, wrong)) is not None
    for tile in (16, 32):
        assert judged(product(x[:, tile:], w[:, tile:])) is not None, f"{tile} columns lost"
    # One input of four at least: with M = 1 few numbers are large, and the worst of a few may be right by luck.
    assert judged(summed_in_16_bits(x, w)) or any(judge(x)(summed_in_16_bits(x, w)) for x in more)


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
    eager, exact = Orders(gradients, right, dtype), gradients(right, torch.float64)
    assert_gradients_no_worse(gradients(right, dtype), eager, exact)
    with pytest.raises(AssertionError, match="'x'"):
        assert_gradients_no_worse(gradients(wrong, dtype), eager, exact)
