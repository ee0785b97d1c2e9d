"""What changes from call to call under torch.compile, and makes no graph of its own: the number of tokens, LoRA's scaling."""

import pytest
import torch
from numerics import assert_rounding_apart
from prepared_layers import LAYERS

from cases.weights import quantize, random_weight
from fastfuse.ops import nf4_dequantize, nf4_lora_linear, nf4_swiglu_mlp
from fastfuse.quant import NF4View


def counted(function, backend, dynamic):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


def nf4(N, K, storage="nested"):
    return NF4View.of(quantize(random_weight(N, K), storage))


# dynamic=None: the first change makes PyTorch's second graph, none after it does.
compiled_twice = pytest.mark.parametrize("backend, dynamic, graphs, storage", [("aot_eager", True, 1, "flat"), ("inductor", None, 2, "torchao")])


@compiled_twice
def test_the_op(backend, dynamic, graphs, storage):
    weight, a, b = nf4(64, 128, storage), torch.randn(8, 128, requires_grad=True), torch.randn(64, 8, requires_grad=True)

    def function(x, scaling):
        return nf4_lora_linear(x, weight, a, b, scaling)

    compiled, counter = counted(function, backend, dynamic)
    for i in range(10):
        x = torch.randn(5 + 3 * i, 128, requires_grad=True)
        results = [[y := f(x, 0.5 + i), *torch.autograd.grad(y.square().sum(), [x, a, b])] for f in (compiled, function)]
        for got, want in zip(*results, strict=True):
            assert_rounding_apart(got, want, K=128, products=4)
    assert counter.frame_count == graphs


@pytest.mark.parametrize("kind, dynamic, graphs", [("PEFT over bitsandbytes", True, 1), ("PEFT over torchao", None, 2), ("LoRALinear", None, 2)])
def test_layers(kind, dynamic, graphs):
    layer = LAYERS[kind]()
    compiled, counter = counted(layer, "aot_eager", dynamic)
    for i in range(10):
        if kind == "LoRALinear":
            layer.alpha = 8.0 + i
        else:
            layer.scale_layer(1.25)
        x = torch.randn(5 + i, 128)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == graphs


@compiled_twice
def test_dropout_probability(backend, dynamic, graphs, storage):
    """A and B of ones on the diagonal let the update show which elements were dropped, and what the others were multiplied by."""
    weight, a, b = nf4(64, 128, storage), torch.eye(128).requires_grad_(), torch.eye(64, 128).requires_grad_()
    compiled, counter = counted(lambda x, p: nf4_lora_linear(x, weight, a, b, 2.0, dropout_p=p, training=True), backend, dynamic)
    x = torch.rand(500, 128) + 1
    base = nf4_lora_linear(x, weight, a, torch.zeros_like(b), 2.0)
    magnitude, eps = x @ nf4_dequantize(weight, torch.float32).abs().T, torch.finfo(torch.float32).eps
    for p in (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.8, 0.85, 0.9, 0.95):
        y = compiled(x, p)
        assert not torch.equal(y, compiled(x, p))  # a seed drawn anew at every call, not baked into the graph
        factor = ((y - base) / x[:, :64]).detach()
        kept = factor.abs() > 1
        # y and base are fp32 sums: 128 products of x and W, and y's update of at most 2 / (1 - p) x more; each addition rounds once. x is 1 or more.
        allowed = 2 * (128 + 8) * eps * (magnitude + 2 / (1 - p) * x[:, :64])
        assert ((factor - torch.where(kept, 2 / (1 - p), 0.0)).abs() <= allowed).all()
        share = kept.float().mean().item()
        assert abs(share - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
        (gradient,) = torch.autograd.grad(y.sum(), b)
        want = (kept * x[:, :64]).double().sum(0) * 2 / (1 - p)
        assert ((gradient[:, :64].diagonal() - want).abs() <= (len(x) + 8) * eps * want).all()  # a sum of positive numbers, a rounding for each
    assert counter.frame_count == graphs


def test_dropout_inside_of_an_mlp_compiles():
    """A graph for each probability, there."""
    layers = [(nf4(n, k), torch.randn(8, k), torch.randn(n, 8), 2.0) for n, k in ((128, 64), (128, 64), (64, 128))]
    compiled, _ = counted(lambda x, p: nf4_swiglu_mlp(x, *layers, dropout_p=p, training=True), "aot_eager", None)
    for p in (0.1, 0.3, 0.5):
        assert compiled(torch.randn(3, 64), p).isfinite().all()
