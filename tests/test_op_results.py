"""What NF4's ops return belongs to the caller: it may be changed in place, with gradients flowing through. test_ops.py has this of the others."""

import pytest
import torch

import fastfuse
from cases.weights import STORAGES, quantize, random_weight
from fastfuse.ops import lora_linear, nf4_linear, nf4_lora_linear, nf4_lora_linears, nf4_swiglu_mlp
from fastfuse.quant import NF4View


def adapter(N: int = 64, K: int = 64):
    return torch.randn(4, K, requires_grad=True), torch.randn(N, 4, requires_grad=True), 0.5


def weight():
    return quantize(torch.randn(64, 64), "flat")


CALLS = {
    "nf4_linear": lambda x: nf4_linear(x, weight(), torch.randn(64, requires_grad=True)),
    "nf4_lora_linear": lambda x: nf4_lora_linear(x, weight(), *adapter()),
    "nf4_lora_linear, DoRA": lambda x: nf4_lora_linear(x, weight(), *adapter(), magnitude=torch.rand(64), bias=torch.randn(64)),
    "nf4_lora_linears": lambda x: nf4_lora_linears(x, [(weight(), *adapter()), (weight(),)])[1],
    "nf4_swiglu_mlp": lambda x: nf4_swiglu_mlp(x, *((weight(), *adapter()) for _ in range(3))),
    "lora_linear": lambda x: lora_linear(x, torch.randn(64, 64), *adapter()),
}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("op", CALLS)
def test_changed_in_place(op, backend):
    x = torch.randn(2, 3, 64, requires_grad=True)
    with fastfuse.backend(backend):
        torch.manual_seed(1)
        y = CALLS[op](x)
        (want,) = torch.autograd.grad((y * 2 + 1).relu().square().sum(), x)
        torch.manual_seed(1)
        y = CALLS[op](x).mul_(2).add_(1).relu_()
        (got,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("backend", ["auto", "triton"] if not torch.cuda.is_available() else ["auto"])
def test_tensors_that_are_negated_when_they_are_read(op, backend):
    """conj().imag is a view whose sign is in a flag: PyTorch's dispatcher resolves it, and so must a call that goes past it."""
    x = torch.view_as_complex(torch.randn(2, 3, 64, 2)).conj().imag
    assert x.is_neg()
    with fastfuse.backend(backend):
        torch.manual_seed(1)
        want = CALLS[op](x.resolve_neg())
        torch.manual_seed(1)
        torch.testing.assert_close(CALLS[op](x), want)


@pytest.mark.parametrize("storage", STORAGES)
def test_hooks_of_saved_tensors_see_activations_and_no_frozen_weight(storage):
    """Activation offloading would carry the whole 4-bit base to the host and back."""
    weight, x = NF4View.of(quantize(random_weight(512, 256), storage)), torch.randn(7, 256, requires_grad=True)
    a, b = torch.randn(8, 256, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    want = torch.autograd.grad(nf4_lora_linear(x, weight, a, b, 2.0).sum(), [x, a, b])
    seen = []

    def pack(t):
        seen.append(t.numel() * t.element_size())
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = nf4_lora_linear(x, weight, a, b, 2.0)
    assert sum(seen) == 4 * (x.numel() + a.numel() + b.numel() + 7 * 8)  # the last one x A^T
    assert all(torch.equal(g, w) for g, w in zip(torch.autograd.grad(y.sum(), [x, a, b]), want, strict=True))


def test_a_frozen_weight_changed_before_the_backward_is_an_error():
    weight, x = NF4View.of(quantize(random_weight(64, 128), "nested")), torch.randn(7, 128, requires_grad=True)
    y = nf4_linear(x, weight)
    weight.packed.zero_()
    with pytest.raises(RuntimeError, match="nf4_linear: a frozen weight was changed in place"):
        y.sum().backward()
